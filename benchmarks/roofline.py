"""What the card at hand can do, measured in the same run: a large copy and a large matrix product."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .harness import measure

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# Bytes copied, side of the matrices: larger than any cache, and small enough for a CPU's patience.
SIZES = {"cuda": (1 << 30, 8192), "cpu": (64 << 20, 1024)}


@cache
def peak_gbps(device: torch.device) -> float:
    """Bytes read and written in a second by a copy, in 10^9."""
    size, _ = SIZES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, rounds=10, device=device)["copy"]
    return 2 * size / timing.p20 / 1e6


@cache
def peak_tflops(device: torch.device, dtype: str) -> float:
    """Of a square product in a dtype of ``DTYPES``."""
    _, side = SIZES[device.type]
    a, b = (torch.randn(side, side, dtype=DTYPES[dtype], device=device) for _ in range(2))
    with products_in(dtype):
        timing = measure({"matmul": lambda: a @ b}, rounds=10, device=device)["matmul"]
    return 2 * side**3 / timing.p20 / 1e9


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """torch's float32 products on a GPU in tf32 if that is the dtype, else exact; convolutions as well."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
