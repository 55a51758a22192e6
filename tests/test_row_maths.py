"""The scalar functions that the compiled ops are made of: activations, bfloat16, a norm's statistics."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plain_ops
import pytest
import torch

from fastvit.contract import judge_saved

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (looked for c++, g++, clang++)")
sys.path.insert(0, str(CSRC))
import cuda_report  # noqa: E402
import libraries  # noqa: E402

DTYPES = {torch.float32: "float", torch.float64: "double"}
ACTIVATIONS = [(name, dtype) for name in plain_ops.ACTIVATIONS for dtype in DTYPES]
# Everywhere a model goes, both sides of where a tail is cut, and around zero, in steps no power of two.
GRID = torch.cat([torch.linspace(-14, 14, 200_003), torch.linspace(-1e-3, 1e-3, 2001)]).double()
EXTREMES = torch.tensor(
    [
        value * sign
        for value in (torch.inf, torch.nan, 3e38, 1e30, 1e13, 100, 88, 87, 6, 0)
        for sign in (1, -1)
    ]
).double()


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    """The functions, compiled with the flags that the loops over rows have, for vectors if there are."""
    library = tmp_path_factory.mktemp("row_maths") / "row_maths.so"
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *libraries.LOOP_FLAGS]
    flags += [flag for flag in libraries.LEVELS["v3"] if _has_v3()]
    command = [COMPILER, *flags, f"-I{CSRC}", str(TESTS / "row_maths.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _has_v3():
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def call(function, *arguments):
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))


def activated(maths, name, x):
    """Value, the value that comes with the slope, and the slope."""
    results = [torch.empty_like(x) for _ in range(3)]
    call(getattr(maths, f"{name}_{DTYPES[x.dtype]}"), x, *results, ctypes.c_int64(x.numel()))
    return results


# torch's own 1 + erf and 1 + tanh cancel where x is negative.
TRUTHS = plain_ops.ACTIVATIONS | {
    "gelu": lambda x: x * torch.special.erfc(-x / 2**0.5) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


def true(function, x):
    """Value and slope in float64."""
    x = x.double().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize(("name", "dtype"), ACTIVATIONS)
def test_activations_are_as_exact_as_their_type(maths, name, dtype):
    x = GRID.to(dtype)
    value, both, slope = activated(maths, name, x)
    truth, true_slope = true(TRUTHS[name], x)
    eps, size = torch.finfo(dtype).eps, x.double().abs()
    # An exponent's rounding grows with it, x^2 or x^3; what float32 has no room for is zero.
    limit = eps * (4 + size**3) * truth.abs() + 100 * torch.finfo(dtype).tiny
    for found in (value, both):
        assert ((found - truth).abs() <= limit).all()
    assert ((slope - true_slope).abs() <= 8 * eps * (1 + size)).all()


def test_gelu_for_half_precision_is_within_what_it_says(maths):
    x = GRID.float()
    value, both, slope = activated(maths, "gelu_half", x)
    truth, true_slope = true(TRUTHS["gelu"], x)
    assert max((found - truth).abs().max() for found in (value, both)) <= 3.6e-6
    # A hundredth of what bfloat16 rounds a slope of one by.
    assert (slope - true_slope).abs().max() <= 2**-9 / 100


# Every finite number that either type holds, with a CPU's functions and with a GPU's at their worst.
@pytest.mark.parametrize("name", ["gelu_half", "gelu_half_above", "gelu_half_below"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_for_half_precision_is_right_for_every_half(maths, name, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    x = x[x.isfinite()]
    value, both, slope = activated(maths, name, x)
    truth, true_slope = true(TRUTHS["gelu"], x)
    assert torch.equal(value, both)
    assert (value - truth).abs().max() <= (3.6e-6 if name == "gelu_half" else 4e-6)
    assert (slope - true_slope).abs().max() <= 2**-9 / 100
    negative = x < -20
    assert (value[negative] == 0).all()
    assert (slope[negative] == 0).all()


NAMES_AND_DTYPES = [*ACTIVATIONS, *((f"gelu_half{side}", torch.float32) for side in ("", "_above", "_below"))]


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
def test_activations_are_finite_where_torchs_own_are(maths, name, dtype):
    x = EXTREMES.to(dtype)
    value, both, slope = activated(maths, name, x)
    truth, true_slope = true(plain_ops.ACTIVATIONS[name.partition("_half")[0]], x)
    for found, expected in ((value, truth), (both, truth), (slope, true_slope)):
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            unlike = test(found) != test(expected.to(dtype))
            assert not unlike.any(), f"{found[unlike].tolist()} at {x[unlike].tolist()}"


def test_the_exponential_is_within_two_ulp_and_ends_at_zero_and_infinity(maths):
    x = torch.cat([torch.linspace(-200, 200, 400_001), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    found = torch.empty_like(x)
    call(maths.exponential_float, x, found, ctypes.c_int64(x.numel()))
    inside = (x >= -87) & (x <= 88)
    truth = x.double().exp()
    assert ((found - truth).abs() <= 2 * 2**-23 * truth)[inside].all()
    assert (found[x < -87] == 0).all()
    assert (found[x > 88] == torch.inf).all()
    assert found[-1].isnan()


def test_a_power_of_two_is_within_two_ulp_and_ends_at_zero_and_infinity(maths):
    x = torch.cat([torch.linspace(-300, 300, 400_001), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    found = torch.empty_like(x)
    call(maths.power_of_two_float, x, found, ctypes.c_int64(x.numel()))
    inside = (x >= -126) & (x < 127.5)
    truth = x.double().exp2()
    assert ((found - truth).abs() <= 2 * 2**-23 * truth)[inside].all()
    assert (found[x < -126] <= 2**-126).all()
    assert (found[x >= 128] == torch.inf).all()
    assert found[-1].isnan()


def test_the_quotient_of_a_sum_is_rounded_as_a_division(maths):
    widths = torch.cat([torch.arange(1, 4097), torch.tensor([6144.0, 8192.0, 65_537.0])]).float()
    sums = (
        torch.randn(64, len(widths), generator=torch.Generator().manual_seed(0))
        * 10.0 ** torch.arange(-16, 16).repeat(2)[:, None]
    )
    sums[0, ::2], sums[0, 1::2], sums[1, ::2], sums[1, 1::2] = torch.inf, -torch.inf, torch.nan, 0.0
    width, found = widths.expand_as(sums).contiguous(), torch.empty_like(sums)
    call(maths.quotient_float, sums, width, found, ctypes.c_int64(sums.numel()))
    expected = sums / width
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])


NVCC, CUOBJDUMP = libraries.find_nvcc(), cuda_report.find_cuobjdump()
# What a thread of an epilogue holds, through one of GeluHalf's functions.
KERNEL = """
#include "activations.h"
using namespace fastvit;
__device__ float value(float x) { return GeluHalf::value(x); }
__device__ float both(float x) { float slope; float y = GeluHalf::both(x, slope); return y * slope; }
__device__ float nothing(float x) { return x; }
extern "C" __global__ void kernel(float* x) {
  float held[16];
  for (int i = 0; i < 16; ++i) held[i] = x[i * 32];
  for (int i = 0; i < 16; ++i) x[(i + 16) * 32] = FUNCTION(held[i]);
}
"""


def instructions(function, folder):
    """How many machine instructions for Hopper it takes, of a kernel on sixteen numbers."""
    source, cubin = folder / f"{function}.cu", folder / f"{function}.cubin"
    source.write_text(KERNEL.replace("FUNCTION", function))
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-arch=sm_90a",
        "-cubin",
        f"-I{CSRC}",
        str(source),
        "-o",
        str(cubin),
    ]
    subprocess.run(command, check=True)
    text = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?\w+ )?([A-Z]\w+)", text)
    return sum(name not in ("NOP", "BRA") for name in found)


@pytest.mark.skipif(None in (NVCC, CUOBJDUMP), reason="no nvcc or no cuobjdump")
def test_gelu_for_half_precision_takes_few_instructions(tmp_path):
    nothing = instructions("nothing", tmp_path)
    assert 16 * 10 < instructions("value", tmp_path) - nothing <= 16 * 11 + 4
    # One of these multiplies the value by the slope, so that both are needed.
    assert 16 * 17 < instructions("both", tmp_path) - nothing <= 16 * 18 + 8


def test_bfloat16_is_read_as_torch_reads_it(maths):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    found = torch.empty(2**16)
    call(maths.widened, bits, found, ctypes.c_int64(2**16))
    assert torch.equal(found.view(torch.int32), bits.view(torch.bfloat16).float().view(torch.int32))


# Each pattern of the upper half with what decides: nothing below, just under a tie, the tie, just over, all.
def test_bfloat16_is_rounded_as_torch_rounds_it(maths):
    upper = torch.arange(2**16, dtype=torch.int64)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper[:, None] * 2**16 + lower).flatten().to(torch.uint32).view(torch.float32)
    found = torch.empty(x.numel(), dtype=torch.uint16)
    call(maths.rounded, x, found, ctypes.c_int64(x.numel()))
    found, expected = found.view(torch.bfloat16), x.bfloat16()
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found.view(torch.int16)[~x.isnan()], expected.view(torch.int16)[~x.isnan()])


ROWS = {
    "randn": lambda x: x,
    "offset": lambda x: x + 1e3,
    "small": lambda x: 3e-3 * x,
    "constant": lambda x: torch.ones_like(x),
    "outlier": lambda x: x.index_fill(0, torch.tensor([5]), 100),
    "one": lambda x: x[:1],
}


# Also with a mean that was guessed badly, as a sum in float32 does of a large one: what is left is found.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("off", [None, 0.01])
def test_statistics_of_a_row(maths, dtype, rms, row, off):
    x = row(torch.randn(193, dtype=torch.float64)).to(dtype)
    grad, eps = torch.randn(x.shape).to(dtype), 1e-6
    mean, rstd, normalized, dx = (x.new_empty(size) for size in (1, 1, len(x), len(x)))
    guess = ctypes.c_void_p(None) if off is None else x.mean(0, keepdim=True) + off
    scalar = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[dtype]
    cols = ctypes.c_int64(len(x))
    call(
        getattr(maths, f"statistics_{DTYPES[dtype]}"),
        x,
        guess,
        scalar(eps),
        rms,
        cols,
        mean,
        rstd,
        normalized,
    )
    call(getattr(maths, f"slope_{DTYPES[dtype]}"), grad, normalized, scalar(rstd.item()), rms, cols, dx)

    exact = x.double().requires_grad_()
    centre = torch.zeros(()) if rms else exact.mean()
    true_rstd = ((exact - centre).square().mean() + eps).rsqrt()
    (true_dx,) = torch.autograd.grad(((exact - centre) * true_rstd * grad.double()).sum(), exact)
    size = exact.detach().abs().mean()
    # Of equal numbers the squares of a wrong mean are all there is, and only nearly cancel.
    if off is None or len(exact.unique()) > 1:
        check = judge_saved("rstd", rstd.float(), true_rstd.detach()[None])
        assert check.ok, check
        torch.testing.assert_close(dx.double(), true_dx, rtol=1e-4, atol=1e-4 * true_rstd.item())
    check = judge_saved("mean", mean.float(), centre.detach().double()[None], scale=size[None])
    assert check.ok, check
