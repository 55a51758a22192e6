"""The compiled parts: fastvit._C with build information, and the libraries of ops for the CPU and for CUDA.

Each is loaded once, when it is first asked for, and never by `import fastvit`.
"""

import functools
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from .errors import ExtensionMismatch, ExtensionNotBuilt

FOLDER = Path(__file__).parent
NOT_INSTALLED = (
    "fastvit._C is not built: this copy of fastvit was not installed; run `make setup` or pip install"
)


@dataclass(frozen=True)
class BuildInfo:
    """What the compiled module was built with. `torch` may be "none"; `cuda` is what FASTVIT_CUDA was.

    `cutlass` is the version that products with the activation in their epilogue are made of, or "none".
    """

    version: str
    compiler: str
    cxx_standard: int
    torch: str
    cuda: str
    cuda_archs: tuple[str, ...]
    cutlass: str = "none"

    def __str__(self) -> str:
        archs = ", ".join(self.cuda_archs) or "none"
        standard = f"C++{self.cxx_standard // 100 % 100}"
        return (
            f"fastvit {self.version}, {self.compiler}, {standard}, built beside torch {self.torch}, "
            f"FASTVIT_CUDA={self.cuda}, CUDA architectures: {archs}, CUTLASS: {self.cutlass}"
        )


def build_info() -> BuildInfo:
    """What the compiled module was built with.

    Raises:
        ExtensionNotBuilt: it is absent; the message is the reason that the installation noted.
        ExtensionMismatch: it is there, for another Python or version of fastvit, or it does not load; the
            message then holds the loader's own text.
    """
    facts = _load(FOLDER).build_info()
    info = BuildInfo(**facts | {"cuda_archs": tuple(facts["cuda_archs"] or ())})
    installed = sys.modules[__package__].__version__
    if info.version != installed:
        versions = f"fastvit {info.version}, found {installed}"
        raise ExtensionMismatch(f"fastvit._C was built for {versions}: install fastvit again")
    return info


@functools.cache
def _load(folder: Path) -> ModuleType:
    path = next((file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_C{suffix}").is_file()), None)
    if path is None:
        raise _absence(folder)
    spec = importlib.util.spec_from_file_location("fastvit._C", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ExtensionMismatch(f"{path.name} does not load here: {error}") from error
    return module


def cuda_archs() -> tuple[str, ...]:
    """The architectures that the CUDA library is built for, "80" or "90a" say."""
    return build_info().cuda_archs


def load_ops(device: str) -> None:
    """Load the library with the ops for "cpu" or "cuda", which then are in ``torch.ops.fastvit_native``.

    Raises:
        ExtensionNotBuilt: it is absent; the message is the reason that the installation noted.
        ExtensionMismatch: it does not load; the message holds the loader's own text.
    """
    reason = why_no_ops(device)
    if reason is not None:
        raise reason


@functools.cache
def why_no_ops(device: str) -> ExtensionMismatch | ExtensionNotBuilt | None:
    """None, with the library loaded, or what ``load_ops`` raises."""
    path = FOLDER / f"_fastvit_{device}.so"
    if not path.is_file():
        note = path.with_suffix(".missing")
        absent = NOT_INSTALLED.replace("fastvit._C", f"fastvit/{path.name}")
        return ExtensionNotBuilt(note.read_text().strip() if note.is_file() else absent)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own text names the file alone; the loader's is behind it.
        text = str(error.__cause__ or error).replace(f"{FOLDER}/", "").splitlines()[0]
        return ExtensionMismatch(f"{path.name} does not load here, beside torch {torch.__version__}: {text}")
    return None


def _absence(folder: Path) -> ExtensionMismatch | ExtensionNotBuilt:
    others = [file.name for pattern in ("_C.*.so", "_C.*.pyd") for file in sorted(folder.glob(pattern))]
    if others:
        found = f"found {sys.implementation.cache_tag}: install fastvit again with this Python"
        return ExtensionMismatch(f"fastvit._C was built for {', '.join(others)}, {found}")
    note = folder / "_C.missing"
    return ExtensionNotBuilt(note.read_text().strip() if note.is_file() else NOT_INSTALLED)
