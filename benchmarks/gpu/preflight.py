"""What `make gpu` finds on a machine before it starts: the GPU, the tools, and what results depend on."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvit import extension, gpus, native_backend

from ..machine import machine
from .ledger import State

ROOT = Path(__file__).resolve().parent.parent.parent
OLDEST = (8, 0)
HOPPER = (9, 0)
SOURCES = ("fastvit", "kernels", "benchmarks", "csrc", "tests/gpu")
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


class Missing(Exception):
    """Why nothing can run here, and what to do: one line."""


@dataclass(frozen=True)
class Facts:
    """``library``: why there is no CUDA library for this GPU yet, or None. Memory is in GB."""

    gpu: str
    capability: tuple[int, int]
    gpus: int
    free: float
    total: float
    library: str | None
    nvcc: str | None
    sanitizer: str | None
    cutlass: bool
    packages: frozenset[str]
    state: State
    fresh: bool = False

    @property
    def slug(self) -> str:
        """ "h100-80gb-hbm3" of "NVIDIA H100 80GB HBM3"."""
        return slug(self.gpu)

    @property
    def arch(self) -> str:
        """What FASTVIT_CUDA_ARCHS calls it."""
        number = "".join(map(str, self.capability))
        return {"86": "80", "87": "80", "90": "90a", "103": "100"}.get(number, number)

    def notes(self) -> list[str]:
        """What is less than it could be, a line each."""
        said = []
        if self.library and not self.nvcc:
            said.append(f"{self.library}, and nvcc is neither on PATH nor in CUDA_HOME/bin to build it")
        if self.capability == HOPPER and not self.cutlass:
            said.append("CUTLASS's headers are absent (pip install --no-deps nvidia-cutlass): no fused fc1")
        if not self.sanitizer:
            said.append("compute-sanitizer is absent (it comes with the CUDA toolkit): no sanitizers")
        if self.free < 0.9 * self.total:
            held = self.total - self.free
            said.append(f"other programs hold {held:.0f} GB of GPU memory: times may suffer")
        for package, loss in (("timm", "no whole models"), ("xdist", "tests run in one process")):
            if package not in self.packages:
                said.append(f"{package} is not installed: {loss}")
        return said


def slug(name: str) -> str:
    """A GPU's name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")


def look(commit: str = "", fresh: bool = False) -> Facts:
    """The machine at hand.

    Args:
        commit: for a copy of the sources without a git history.

    Raises:
        Missing: if it has no GPU that the kernels run on, or this is no checkout.
    """
    if gpus.assumed() is not None:
        raise Missing("FASTVIT_ARCH answers for a GPU that is not here: unset it")
    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA: install one that is built with it")
    if not torch.cuda.is_available():
        raise Missing("torch finds no CUDA GPU: run this where nvidia-smi lists one that the driver serves")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        raise Missing(f"{torch.cuda.get_device_name()} is of compute capability {capability}: 8.0 is needed")
    if not (ROOT / "tests" / "gpu").is_dir():
        raise Missing(f"{ROOT} has no tests/gpu: run this from a checkout (pip install -e .)")
    here, (free, total) = machine(), _memory()
    toolkit = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    versions = {"python": platform.python_version(), "torch": here.torch, "triton": here.triton or ""}
    commit = commit or (here.commit or "").removesuffix("-dirty")
    cutlass = importlib.util.find_spec("cutlass_library") is not None
    return Facts(
        gpu=here.gpu,
        capability=capability,
        gpus=torch.cuda.device_count(),
        free=free,
        total=total,
        library=_no_library(cutlass and capability == HOPPER),
        nvcc=shutil.which("nvcc") or shutil.which("nvcc", path=toolkit),
        sanitizer=shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit),
        cutlass=cutlass,
        packages=frozenset(name for name in ("timm", "xdist") if importlib.util.find_spec(name)),
        state=State(commit, sources(), versions | {"driver": here.driver or ""}),
        fresh=fresh,
    )


def sources(root: Path = ROOT) -> str:
    """A hash of all that is compiled or run; not of the tables, which the stages themselves write."""
    digest = hashlib.sha256((root / "setup.py").read_bytes())
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _no_library(with_cutlass: bool) -> str | None:
    """Why the CUDA library does not serve this GPU as well as it could."""
    reason = native_backend.can_run("layer_norm_mlp", "cuda")
    if reason is None and with_cutlass and extension.build_info().cutlass == "none":
        return "the CUDA library is built without CUTLASS"
    return reason


def _memory() -> tuple[float, float]:
    """Free and total, asked of the driver's own tool: torch would hold some itself from then on."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", "-i", device, "--query-gpu=memory.free,memory.total"]
    command += ["--format=csv,noheader,nounits"]
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        free_mib, total_mib = (float(part) for part in said.splitlines()[0].split(","))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return total, total
    return total * free_mib / total_mib, total
