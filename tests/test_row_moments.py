"""The moments of rows that a product leaves for the next norm, as far as they are maths."""

import ctypes
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import op_cases
import pytest
import test_fc1
import test_folding
import torch
from fc1_library import COMPILER, CSRC, call, compiled_with, libraries, needs_compiler
from native_mutants import Mutant
from test_fc1 import HALF

from fastvit.contract import judge_saved
from fastvit.ops import native

TESTS = Path(__file__).parent
EPS = 1e-6
FP32, FP64 = torch.float32, torch.float64
SCALAR = {FP32: ctypes.c_float, FP64: ctypes.c_double}
NAMES = {FP32: "float", FP64: "double"}


def compiled(folder, sources=CSRC):
    """The header behind plain C names."""
    library = folder / "row_moments.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += libraries.LOOP_FLAGS
    command = [COMPILER, *flags, f"-I{sources}", str(TESTS / "row_moments.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("row_moments"))


@pytest.fixture(scope="module")
def fc1(tmp_path_factory):
    return test_fc1.compiled(tmp_path_factory.mktemp("fc1"))


def parts(columns):
    return -(-columns // native.MOMENT_COLUMNS)


def taken(maths, x, tile=None):
    """By a loop over each row, or as a product with such tiles takes them: every part is to be written."""
    moments = x.new_full((parts(x.shape[1]), len(x), 2), torch.nan)
    if tile is None:
        call(getattr(maths, f"moments_{NAMES[x.dtype]}"), x, moments, *x.shape)
    else:
        call(maths.epilogue_moments, x, moments, *x.shape, tile)
    return moments


def statistics(maths, x, tile=None, rms=False):
    """Mean and rstd of rows from their moments."""
    mean, rstd = x.new_empty(len(x)), x.new_empty(len(x))
    function = getattr(maths, f"statistics_{NAMES[x.dtype]}")
    call(function, taken(maths, x, tile), mean, rstd, *x.shape, SCALAR[x.dtype](EPS), ctypes.c_int(rms))
    return mean, rstd


def true(x, rms):
    exact = x.double()
    centre = torch.zeros(len(x), dtype=FP64) if rms else exact.mean(1)
    return centre, ((exact - centre[:, None]).square().mean(1) + EPS).rsqrt()


# What rows are like: of a product that was rounded to half precision, or wide, as a CPU has them.
ROWS = {
    "randn": lambda x: x,
    "small": lambda x: 3e-3 * x,
    "amplitude": lambda x: 1e3 * x,
    "mean of 30 deviations": lambda x: x + 30,
    "mean of 1000 deviations": lambda x: x + 1e3,
    "one half far from the other": lambda x: x + 50 * (torch.arange(x.shape[1]) > x.shape[1] // 2),
    "a trend": lambda x: x + torch.linspace(-100, 100, x.shape[1]),
    "outlier": lambda x: x.index_fill(1, torch.tensor([5]), 1e4),
    "first is the outlier": lambda x: x.index_fill(1, torch.tensor([0]), -1e4),
}
# A part of a tile, whole ones, and a part of a part.
COLUMNS = (8, 24, 40, 64, 72, 192, 328, 768)
TILES = (None, 128, 192, 256)


def exact_statistics(maths, dtype, columns, row, tile=None, rms=False):
    """As exact as what any norm of ours saves."""
    x = row(torch.randn(17, columns, generator=torch.Generator().manual_seed(columns)).double())
    x = x.to(dtype).to(FP32)
    (mean, rstd), (centre, true_rstd) = statistics(maths, x, tile, rms), true(x, rms)
    for check in (
        judge_saved("rstd", rstd, true_rstd),
        judge_saved("mean", mean, centre, scale=x.double().abs().mean(1)),
    ):
        assert check.ok, check


@needs_compiler
@pytest.mark.parametrize("dtype", [*HALF, FP32], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_statistics_are_as_exact_as_a_norms_own(maths, dtype, columns, row):
    for tile in TILES:
        for rms in (False, True):
            exact_statistics(maths, dtype, columns, row, tile, rms)


# What a sum of plain squares would make of such rows; without it the test above would show nothing.
def test_plain_sums_would_not_be():
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(0)) + 1e3
    rstd = (x.square().mean(1) - x.mean(1) ** 2 + EPS).clamp(min=EPS).rsqrt()
    assert not judge_saved("rstd", rstd, true(x, False)[1]).ok


@needs_compiler
def test_float64_is_exact(maths):
    x = torch.randn(17, 328, dtype=FP64, generator=torch.Generator().manual_seed(0)) + 1e3
    for rms in (False, True):
        for found, truth in zip(statistics(maths, x, rms=rms), true(x, rms), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)


def equal_rows(maths, tile=None):
    """Of equal numbers nothing is left after the mean, and the deviation is eps alone."""
    x = torch.tensor([3.0, -1.5, 0.0, 1024.0]).repeat_interleave(72).view(4, 72)
    moments = taken(maths, x, tile)
    assert torch.equal(moments[:, :, 0], x[:, :2].T)
    assert not moments[:, :, 1].any()
    torch.testing.assert_close(statistics(maths, x, tile)[1], torch.full((4,), EPS**-0.5))


@needs_compiler
@pytest.mark.parametrize("tile", TILES)
def test_equal_numbers_have_no_spread(maths, tile):
    equal_rows(maths, tile)


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tile", TILES)
def test_what_is_not_finite_is_seen(maths, bad, tile):
    x = torch.randn(3, 192)
    x[1, 70] = bad
    mean, rstd = statistics(maths, x, tile)
    assert mean.isfinite().tolist() == rstd.isfinite().tolist() == [True, False, True]


def each_part(maths, tile=128):
    """The moments themselves, part by part: what one product leaves, another library's norm may read."""
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) + 7
    found = taken(maths, x, tile)
    for part, of in enumerate(x.double().split(native.MOMENT_COLUMNS, 1)):
        mean = of.mean(1)
        torch.testing.assert_close(found[part, :, 0].double(), mean, rtol=1e-6, atol=0)
        squares = (of - mean[:, None]).square().sum(1)
        torch.testing.assert_close(found[part, :, 1].double(), squares, rtol=3e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("tile", TILES)
def test_moments_are_of_parts(maths, tile):
    each_part(maths, tile)


def with_moments(maths, fc1):
    """test_folding's functions, the norm's statistics coming from moments that a product left."""

    def from_moments(x, mean, rstd, rows, columns, eps, rms):
        moments = torch.full((parts(columns.value), rows.value, 2), torch.nan)
        call(maths.epilogue_moments, x, moments, rows, columns, 128)
        call(maths.statistics_float, moments, mean, rstd, rows, columns, eps, rms)

    return SimpleNamespace(statistics=from_moments, normalized=fc1.normalized, activated=fc1.activated)


@needs_compiler
@pytest.mark.parametrize("cell", test_folding.CELLS, ids=op_cases.name)
def test_a_folded_norm_from_moments_is_within_the_contract(maths, fc1, cell):
    one = test_folding.given(cell["dtype"], cell["regime"]) | dict.fromkeys(cell["without"])
    functions = with_moments(maths, fc1)
    test_folding.within_contract(functions, native.folded, one, cell["norm"], cell["activation"])


@needs_compiler
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mean_of_a_hundred_deviations_is_within_the_contract(maths, fc1, dtype):
    one = test_folding.given(dtype, offset=100, width=768)
    test_folding.within_contract(with_moments(maths, fc1), native.folded, one)


CHECKS = {
    "randn": lambda maths: exact_statistics(maths, torch.bfloat16, 200, ROWS["randn"], 128),
    "rms": lambda maths: exact_statistics(maths, torch.bfloat16, 200, ROWS["randn"], rms=True),
    "trend": lambda maths: exact_statistics(maths, FP32, 200, ROWS["a trend"], 128),
    "offset": lambda maths: exact_statistics(maths, FP32, 768, ROWS["mean of 1000 deviations"]),
    "parts": each_part,
    "equal": partial(equal_rows, tile=128),
}


@needs_compiler
@pytest.mark.parametrize("name", CHECKS)
def test_green_without_a_fault(maths, name):
    CHECKS[name](maths)


FAULTS = [
    ("means joined in equal shares", "share = quotient(b.count, count)", "share = 0.5f", "randn"),
    ("what lies between means dropped", "apart * apart * (a.count * share)", "0 * share", "trend"),
    ("a step of the lanes left out", "return sum + exchange(sum, 2);", "return 2 * sum;", "parts"),
    ("columns that are not there", "(i) < count) sum +=", "(i) < 64) sum +=", "parts"),
    ("spread of columns that are not there", "(i) < count) squares", "(i) < 64) squares", "parts"),
    (
        "the second tile for both",
        "held = tile % kTogether == 0 ? own : joined(held, own)",
        "held = own",
        "parts",
    ),
    ("a part that never ends", "left > kTileColumns - kMomentColumns", "left > 0", "parts"),
    (
        "parts of one size",
        "T(left < kMomentColumns ? left : kMomentColumns)",
        "T(left < 0 ? left : kMomentColumns)",
        "randn",
    ),
    ("mean left out of the square", "rms ? variance + row.mean * row.mean : variance", "variance", "rms"),
    ("eps dropped", " : variance) + eps)", " : variance) + 0 * eps)", "equal"),
    ("plain squares", "squares += apart * apart", "squares += load(i) * load(i)", "offset"),
]
MUTANTS = [Mutant("row_moments.h", *row) for row in FAULTS]


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.fault}")
def test_red_with_a_fault(mutant, tmp_path):
    faulty = compiled_with(mutant, tmp_path, compiled)
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](faulty)
