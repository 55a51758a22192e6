"""The facts that a number carries: what it was measured on, with which versions, at which commit."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("fastvit", "kernels", "benchmarks", "csrc")
_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


@dataclass(frozen=True)
class Machine:
    """Absent things (no GPU, no Triton, no git checkout) are None."""

    cpu: str
    threads: int
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    commit: str | None
    date: str

    @property
    def name(self) -> str:
        """For a title: the GPU, else the CPU and its threads."""
        return self.gpu or f"{self.cpu}, {self.threads} thread{'s' * (self.threads != 1)}"


def machine() -> Machine:
    """The machine at hand. Triton is asked for its version without being imported."""
    has_gpu = torch.cuda.is_available()
    return Machine(
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        driver=_driver() if has_gpu else None,
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )


def sources(root: Path = _ROOT) -> str:
    """A hash of all that is compiled or run, and of no table: what was measured depends on it."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (root / folder).rglob("*")):
        if path.suffix in _SUFFIXES:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


@functools.cache
def commit() -> str | None:
    """Of this package's own checkout: installed inside another project, that one's commit says nothing.

    Sources that travel without their history are told theirs by FASTVIT_COMMIT.
    """
    if told := os.environ.get("FASTVIT_COMMIT"):
        return told
    if not (_ROOT / ".git").exists():
        return None
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
