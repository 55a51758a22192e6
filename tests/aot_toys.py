"""Kernels that `make aot` must pass, and kernels that it must fail, for test_aot.py."""

import os

import torch
import triton
import triton.language as tl

from fastvit_kernels.launch import Launch


@triton.jit(do_not_specialize=["stride"])
def multiply(
    a, b, out, absent, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, stride, K):
        x = tl.load(a + rows[:, None] * stride + start + inner[None, :])
        y = tl.load(b + (start + inner)[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if absent is not None:
        total += tl.load(absent + columns)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["depth"])
def attend(a, b, out, depth, N: tl.constexpr, K: tl.constexpr, REST: tl.constexpr):
    """Two products a step, as in attention. The rest behind the loop makes ptxas serialise all of them."""
    columns = tl.arange(0, N)
    x = tl.load(a + columns[:, None] * N + columns[None, :])
    total = tl.zeros((N, N), tl.float32)
    for start in range(0, depth, K):
        total = step(x, a, b, start, total, columns, N, K)
    if REST > 0:
        total = step(x, a, b, depth, total, columns, N, REST)
    tl.store(out + columns[:, None] * N + columns[None, :], total.to(out.dtype.element_ty))


@triton.jit
def step(x, a, b, start, total, columns, N: tl.constexpr, WIDTH: tl.constexpr):
    inner = start + tl.arange(0, WIDTH)
    y = tl.load(a + columns[None, :] + inner[:, None] * N)
    z = tl.load(b + inner[:, None] * N + columns[None, :])
    weights = tl.exp2(tl.dot(x, y.T, input_precision="ieee"))
    return tl.dot(weights.to(tl.float16), z, total * 0.5, input_precision="ieee")


@triton.jit
def add_rows(a, out, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(a + rows[:, None] * N + columns[None, :]).to(tl.float32)
    tl.store(out + columns, tl.sum(tile, 0))


@triton.jit
def leak(a, out, eps: tl.constexpr, N: tl.constexpr):
    columns = tl.arange(0, N)
    tl.store(out + columns, tl.load(a + columns) + tl.full((N,), eps, tl.float64))


@triton.jit
def broken(a, N: tl.constexpr):
    tl.store(a + tl.arange(0, N), undefined)  # noqa: F821


class Crash:
    """A kernel at which the compiler ends its whole process."""

    __name__ = "crash"

    @property
    def signature(self):
        os._exit(7)


def product(m, n, k, dtype=torch.float16, precision="ieee", **options):
    a, b, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, 4096), (4096, n), (m, n)))
    args = {"a": a, "b": b, "out": out, "absent": None, "stride": 4096}
    return Launch(multiply, (1,), args, {"M": m, "N": n, "K": k, "PRECISION": precision}, **options)


def attention(rest):
    args = {name: torch.empty(64, 64, dtype=torch.float16, device="meta") for name in ("a", "b", "out")}
    constants = {"N": 64, "K": 64, "REST": rest}
    return Launch(attend, (1,), args | {"depth": 4096}, constants, num_stages=3)


def aot_launches(arch):
    a, out = torch.empty(64, 64, device="meta"), torch.empty(64, device="meta")
    yield "half small", product(64, 64, 32)
    yield "ieee small", product(32, 32, 32, torch.float32)
    yield "ieee cramped", product(64, 64, 16, torch.float32, num_warps=1)
    yield "ieee rounded", product(32, 32, 32, torch.float32, "tf32")
    yield "tf32 small", product(32, 32, 32, torch.float32, "tf32")
    yield "tf32 exact", product(32, 32, 32, torch.float32)
    yield "half large", product(128, 256, 128, num_warps=8, num_stages=3)
    yield "half cramped", product(128, 64, 16, num_warps=1)
    yield "half dotless", Launch(add_rows, (1,), {"a": a, "out": out}, {"M": 64, "N": 64})
    yield "ieee double", Launch(leak, (1,), {"a": a, "out": out}, {"eps": 1e-6, "N": 64})
    yield "half broken", Launch(broken, (1,), {"a": a}, {"N": 64})
    yield "fp16 unknown", product(64, 64, 32)
    if arch == "sm_90":
        yield "half in flight", attention(0)
        yield "half serialised", attention(16)
    yield "half crash", Launch(Crash(), (1,), {})
