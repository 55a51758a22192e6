"""A CPU's own product with a weight in panels: right in every tile, the same bits on any threads."""

import ctypes
import shutil
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import plain_ops
import pytest
import torch
import torch.nn.functional as F

import fastvit
from fastvit import native_backend, ops
from fastvit.ops import native

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (looked for c++, g++, clang++)")
sys.path.insert(0, str(CSRC))
import libraries  # noqa: E402

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
LEVELS = ["base", *(["v3"] if native_backend.vectors() in ("AVX2", "AVX512") else [])]
# Rows: each height of the last strip, more than one block. Depth: parts that are whole and not.
SIZES = [(rows, 20, 16) for rows in range(1, 8)] + [(197, 300, 48), (400, 512, 32), (13, 257, 16), (6, 1, 32)]


def compiled(level, folder, sources=CSRC):
    library = folder / f"panels_{level}.so"
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *libraries.LOOP_FLAGS]
    flags += [*libraries.LEVELS[level], f"-DFASTVIT_LEVEL={level}", f"-I{sources}"]
    subprocess.run([COMPILER, *flags, str(TESTS / "panel_calls.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module", params=LEVELS)
def library(request, tmp_path_factory):
    return compiled(request.param, tmp_path_factory.mktemp("panels"))


def case(rows, depth, width):
    generator = torch.Generator().manual_seed(rows * depth + width)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator)
        for size in ((rows, depth), (width, depth), width, (rows, width))
    )
    return x, weight * depth**-0.5, bias, residual


def multiply(library, x, weight, bias=None, residual=None, activation=None, shares=1, height=204):
    """In memory that holds nan before and behind, by so many shares of the panels and of blocks so high."""
    (rows, depth), width, panels = x.shape, len(weight), native.panels(weight)
    room = torch.full((rows + 2, width), torch.nan)
    bounds = torch.linspace(0, len(panels), shares + 1).int().tolist()
    given = [
        None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, panels, bias, residual, room[1:])
    ]
    sizes = [ctypes.c_int64(size) for size in (rows, depth, width)]
    chosen = ctypes.c_int(ACTIVATIONS.index(activation) - 1)
    for row, share in product(range(0, rows, height), pairwise(bounds)):
        shared = [ctypes.c_int64(number) for number in (row, min(height, rows - row), *share)]
        library.multiply(*given, *sizes, chosen, *shared)
    assert room[[0, -1]].isnan().all()
    return room[1:-1]


def expected(x, weight, bias=None, residual=None, activation=None):
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = out if activation is None else plain_ops.ACTIVATIONS[activation](out)
    return out if residual is None else out + residual.double()


def right(found, truth):
    return (found.double() - truth).abs().max() < 3e-6 * truth.abs().max()


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("beside", ["", "bias", "residual", "bias residual"])
def test_is_right(library, size, beside):
    x, weight, bias, residual = case(*size)
    given = (bias if "bias" in beside else None, residual if "residual" in beside else None)
    assert right(multiply(library, x, weight, *given), expected(x, weight, *given))


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(library, activation):
    x, weight, bias, residual = case(23, 300, 32)
    for beside in (None, residual):
        found = multiply(library, x, weight, bias, beside, activation)
        assert right(found, expected(x, weight, bias, beside, activation))


@needs_compiler
def test_the_bits_do_not_depend_on_the_threads(library):
    x, weight, bias, residual = case(197, 300, 16 * 7)
    one = multiply(library, x, weight, bias, residual, "gelu")
    for shares, height in ((2, 204), (3, 102), (7, 6), (1, 12)):
        assert torch.equal(multiply(library, x, weight, bias, residual, "gelu", shares, height), one)


@needs_compiler
def test_nan_and_infinity_go_where_they_belong(library):
    x, weight, _, _ = case(9, 40, 32)
    x[4, 7], x[2, 3] = torch.nan, torch.inf
    found = multiply(library, x, weight)
    assert found.isnan().any(1).tolist() == [row == 4 for row in range(9)]
    assert found.isinf().any(1).tolist() == [row == 2 for row in range(9)]


def test_panels():
    weight = torch.arange(32.0 * 3).view(32, 3)
    packed = native.panels(weight)
    assert packed.shape == (2, 3, 16)
    assert packed[1, 2, 5] == weight[21, 2]


@pytest.fixture
def in_panels(monkeypatch):
    """Weights are packed so on any CPU: the library has the product everywhere."""
    monkeypatch.setattr(native_backend, "vectors", lambda: "AVX2")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_ops_take_panels(in_panels, threads):
    generator = torch.Generator().manual_seed(0)
    of = lambda *sizes: torch.randn(sizes, generator=generator)  # noqa: E731
    x, norm = of(2, 101, 48), (of(48), of(48))
    fc1, fc2 = (of(192, 48) / 7, of(192)), (of(48, 192) / 14, of(48))
    calls = {
        "layer_norm_linear": (x, *norm, of(144, 48) / 7, of(144)),
        "linear_residual": (x, of(48, 48) / 7, of(48), of(2, 101, 48)),
        "layer_norm_mlp": (x, *norm, *fc1, *fc2),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for op, inputs in calls.items():
            with torch.no_grad(), fastvit.use_backend("cpp"):
                found = getattr(ops, op)(*inputs)
            with fastvit.use_backend("reference"):
                truth = getattr(ops, op)(*(tensor.double() for tensor in inputs))
            assert right(found, truth), op
    finally:
        torch.set_num_threads(before)


def test_widths_that_no_panel_divides_are_onednns(in_panels):
    x = torch.randn(1, 32, 24)
    assert native._packing(x, torch.empty(24, 24), torch.float32) is not native.panels
    assert native._packing(x, torch.empty(48, 24), torch.float32) is native.panels
    assert native._packing(x[:, :16], torch.empty(48, 24), torch.float32) is None


class Mutant(NamedTuple):
    name: str
    old: str
    new: str


MUTANTS = [
    Mutant("sums forgotten", "if (!to.first) {", "if (false) {"),
    Mutant("sums of before", "if (!to.first) {", "if (true) {"),
    Mutant("finished too early", "if (to.last) {", "if (true) {"),
    Mutant("always the first strip", "p.x + row * p.depth + begin", "p.x + begin"),
    Mutant("always the first part", "p.x + row * p.depth + begin", "p.x + row * p.depth"),
    Mutant("the part before", "(n * p.depth + begin) * kPanel", "n * p.depth * kPanel"),
    Mutant("bias of another panel", "p.bias + column", "p.bias"),
    Mutant("activation of the whole sum", "residual[i] + Function::value(sums[i] + to.bias[i])",
           "Function::value(residual[i] + sums[i] + to.bias[i])"),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_faults_show(mutant, tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources, ignore=shutil.ignore_patterns("*.cu*", "*.py", "__pycache__"))
    text = (sources / "panels.cpp").read_text()
    assert text.count(mutant.old) == 1
    (sources / "panels.cpp").write_text(text.replace(mutant.old, mutant.new))
    library = compiled(LEVELS[-1], tmp_path, sources)
    x, weight, bias, residual = case(200, 300, 48)
    found = multiply(library, x, weight, bias, residual, "gelu")
    assert not right(found, expected(x, weight, bias, residual, "gelu"))
