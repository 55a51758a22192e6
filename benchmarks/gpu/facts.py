"""What there is on a machine with a GPU: `python -m fastvit_benchmarks.gpu.facts [FILE]`.

A process of its own looks, so that the runner holds no GPU: what dies of one is a stage's own process.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
OLDEST = (8, 0)
HOPPER = (9, 0)
PACKAGES = ("timm", "xdist")


class Missing(Exception):
    """Why nothing can run here, and what to do: one line."""


@dataclass(frozen=True)
class Facts:
    """Memory is in GB. ``library`` is why the CUDA library does not serve this GPU, or "".

    ``cache`` says whether what was compiled elsewhere is what is looked up here: "hit", "MISS", or "" where
    nothing was.
    """

    gpu: str
    capability: tuple[int, int]
    gpus: int
    free: float
    total: float
    library: str
    sanitizer: str
    packages: tuple[str, ...]
    versions: dict[str, str]
    cache: str = ""

    @property
    def slug(self) -> str:
        """ "h100-80gb-hbm3" of "NVIDIA H100 80GB HBM3"."""
        return slug(self.gpu)

    @classmethod
    def load(cls, file: Path) -> Self:
        found = json.loads(file.read_text())
        return cls(**found | {"capability": tuple(found["capability"]), "packages": tuple(found["packages"])})

    def notes(self) -> list[str]:
        """What is less than it could be, a line each."""
        lost = {"timm": "no whole models", "xdist": "tests run in one process, and end with a lost context"}
        said = [
            f"{package} is not installed: {loss}"
            for package, loss in lost.items()
            if package not in self.packages
        ]
        if self.library:
            said.append(self.library)
        if not self.sanitizer:
            said.append("compute-sanitizer is absent (it comes with the CUDA toolkit): no sanitizers")
        if self.free < 0.9 * self.total:
            said.append(
                f"other programs hold {self.total - self.free:.0f} GB of GPU memory: times may suffer"
            )
        if self.cache == "MISS":
            said.append("kernels that were packed are not those that are looked up here: they compile anew")
        return said


def slug(name: str) -> str:
    """A GPU's name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")


def look() -> Facts:
    """The machine at hand.

    Raises:
        Missing: if it has no GPU that the kernels run on, or one that does not compute.
    """
    import torch

    from fastvit import gpus, native_backend

    from ..machine import machine

    if gpus.assumed() is not None:
        raise Missing("FASTVIT_ARCH answers for a GPU that is not here: unset it")
    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA: install one that is built with it")
    if not torch.cuda.is_available():
        raise Missing("torch finds no CUDA GPU: run this where nvidia-smi lists one that the driver serves")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        raise Missing(f"{torch.cuda.get_device_name()} is of compute capability {capability}: 8.0 is needed")
    here, (free, total) = machine(), torch.cuda.mem_get_info()
    x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    if not (x @ x == 256).all().item():
        raise Missing(f"{here.gpu} multiplies ones wrongly")
    return Facts(
        gpu=here.gpu,
        capability=capability,
        gpus=torch.cuda.device_count(),
        free=free / 1e9,
        total=total / 1e9,
        library=native_backend.can_run("layer_norm_mlp", "cuda") or "",
        sanitizer=_tool("compute-sanitizer"),
        packages=tuple(name for name in PACKAGES if find_spec(name)),
        versions={
            "python": platform.python_version(),
            "torch": here.torch,
            "triton": here.triton or "",
            "driver": here.driver or "",
        },
        cache=_cache(),
    )


def _tool(name: str) -> str:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=str(toolkit)) or ""


def _cache() -> str:
    expected = os.environ.get("FASTVIT_PACKED_KEY")
    return "" if expected is None else "hit" if expected == triton_key() else "MISS"


def triton_key() -> str:
    """What Triton's keys of compiled kernels hold beside the kernels: its own files, and ptxas."""
    import hashlib

    import triton
    from triton.runtime.cache import triton_key

    ptxas = os.environ.get("TRITON_PTXAS_PATH") or triton.knobs.nvidia.ptxas.path
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(f"{triton_key()}{said}".encode()).hexdigest()[:16]


def main() -> None:
    try:
        facts = look()
    except Missing as reason:
        sys.exit(f"gpu: {reason}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    print(f"{facts.gpu}, {versions}" + (f", packed kernels: {facts.cache}" if facts.cache else ""))


if __name__ == "__main__":
    main()
