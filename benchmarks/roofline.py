"""What the machine at hand can do, measured in the same run: a large copy and large matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from fastvit.native_backend import multiplies_bfloat16

from .harness import Row, Timing, machine, measure

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# Bytes copied, sizes of the product: larger than any cache, and small enough for a CPU's patience.
COPIED = {"cuda": 1 << 30, "cpu": 64 << 20}
PRODUCT = {"cuda": (8192, 8192, 8192), "cpu": (1576, 3072, 768)}


def peak_gbps(device: torch.device) -> float:
    """Bytes read and written in a second by a copy, in 10^9."""
    return 2 * COPIED[device.type] / _copy(device).p20 / 1e6


def peak_tflops(device: torch.device, dtype: str) -> float:
    """Of the best product in a dtype of ``DTYPES``; a CPU's may have its weight packed by oneDNN."""
    rows, columns, depth = PRODUCT[device.type]
    return 2 * rows * columns * depth / _product(device, dtype).p20 / 1e9


def rows(device: torch.device, dtypes: tuple[str, ...]) -> list[Row]:
    """The same as rows of a file of results."""
    here, facts = machine(), {"provider": "torch", "batch": 1, "ok": True}
    size, (m, n, k) = COPIED[device.type], PRODUCT[device.type]
    copied = facts | {"op": "copy", "dtype": "uint8", "shape": (size,), "bytes_moved": 2 * size}
    products = [
        Row.of(
            *(_product(device, dtype), here),
            **facts | {"op": "matmul", "dtype": dtype, "shape": (m, n, k), "flops": 2 * m * n * k},
        )
        for dtype in dtypes
    ]
    return [Row.of(_copy(device), here, **copied), *products]


@cache
def _copy(device: torch.device) -> Timing:
    source = torch.randint(0, 255, (COPIED[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, rounds=10, device=device)["copy"]


@cache
def _product(device: torch.device, dtype: str) -> Timing:
    m, n, k = PRODUCT[device.type]
    a, b = (torch.randn(size, k, dtype=DTYPES[dtype], device=device) for size in (m, n))
    calls = {"matmul": lambda: F.linear(a, b)}
    if device.type == "cpu" and _packs(DTYPES[dtype]):
        packed = torch.ops.mkldnn._reorder_linear_weight(b)
        calls["packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    with products_in(dtype):
        timings = measure(calls, rounds=10, device=device)
    return min(timings.values(), key=lambda timing: timing.p20)


def _packs(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16())


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
