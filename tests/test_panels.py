"""A CPU's own product with a weight in panels: right in every tile, the same bits on any threads."""

import ctypes
import shutil
import subprocess
import sys
from functools import cache, partial
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
LEVELS = {"AVX2": ["base", "v3"], "AVX512": ["base", "v3", "v4"]}.get(native_backend.vectors(), ["base"])
# Rows: each height of the last strip, more than one block. Depth: parts and lines that are whole and not.
SIZES = [(rows, 20, 16) for rows in range(1, 9)] + [(197, 300, 48), (400, 512, 32), (13, 257, 16), (6, 1, 32)]
ODD = [(7, 272, 1), (9, 19, 15), (8, 37, 33), (100, 300, 40), (5, 17, 90)]  # no whole panel at the end
FORMS = ("as it is", "in panels")


def compiled(level, folder, sources=CSRC, optimised="-O3"):
    library = folder / f"panels_{level}.so"
    flags = ["-std=c++17", optimised, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += [*libraries.LOOP_FLAGS, *libraries.LEVELS[level], f"-DFASTVIT_LEVEL={level}", f"-I{sources}"]
    subprocess.run([COMPILER, *flags, str(TESTS / "panel_calls.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panels")
    return cache(lambda level: compiled(level, folder))


# With AVX-512 there are no weights in panels.
@pytest.fixture(params=[pair for pair in product(LEVELS, FORMS) if pair != ("v4", "in panels")], ids=str)
def multiplied(library, request):
    level, form = request.param
    return partial(multiply, library(level), form)


def case(rows, depth, width):
    generator = torch.Generator().manual_seed(rows * depth + width)
    sizes = {"x": (rows, depth), "weight": (width, depth), "residual": (rows, width)}
    sizes |= {"bias": width, "scale": width}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return made | {"weight": made["weight"] * depth**-0.5}


def multiply(
    library, form, x, weight, bias=None, scale=None, residual=None, activation=None, shares=1, height=216
):
    """By so many shares of the columns and of blocks so high. Around the weight and the output is nan."""
    (rows, depth), width = x.shape, len(weight)
    room = torch.full((rows + 2, width + 5), torch.nan)
    if form == "in panels":
        laid = native.panels(weight)
    else:
        laid = torch.full((width + 2, depth + 3), torch.nan)[1:-1, 1:-2].copy_(weight)
    out = room[1:-1, 2:-3]
    columns = torch.linspace(0, -(-width // 32), shares + 1).int() * 32
    given = [
        None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, laid, bias, scale, residual, out)
    ]
    sizes = [ctypes.c_int64(size) for size in (rows, depth, width, laid.stride(0), out.stride(0))]
    chosen = ctypes.c_int(form == "in panels"), ctypes.c_int(ACTIVATIONS.index(activation) - 1)
    for row, (first, last) in product(range(0, rows, height), pairwise(columns.tolist())):
        shared = (row, min(height, rows - row), first, min(last, width))
        library.multiply(*given, *sizes, *chosen, *map(ctypes.c_int64, shared))
    assert room.isnan().sum() == room.numel() - out.numel() + out.isnan().sum()
    return out


def expected(x, weight, bias=None, scale=None, residual=None, activation=None):
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = out if activation is None else plain_ops.ACTIVATIONS[activation](out)
    out = out if scale is None else out * scale.double()
    return out if residual is None else out + residual.double()


def right(found, truth):
    return (found.double() - truth).abs().max() < 3e-6 * truth.abs().max()


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("without", ["", "bias", "scale", "residual", "bias scale residual"])
def test_is_right(multiplied, size, without):
    given = {name: tensor for name, tensor in case(*size).items() if name not in without.split()}
    assert right(multiplied(**given), expected(**given))


@needs_compiler
@pytest.mark.parametrize("size", ODD, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_any_width(library, level, size):
    given = case(*size)
    assert right(multiply(library(level), "as it is", **given), expected(**given))


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(multiplied, activation):
    given = case(23, 300, 32) | {"activation": activation}
    for beside in (given, given | {"residual": None, "scale": None}):
        assert right(multiplied(**beside), expected(**beside))


@needs_compiler
def test_the_bits_do_not_depend_on_the_threads(multiplied):
    given = case(197, 300, 16 * 7)
    one = multiplied(**given, activation="gelu")
    for shares, height in ((2, 216), (3, 96), (4, 24), (1, 12)):
        found = multiplied(**given, activation="gelu", shares=shares, height=height)
        assert torch.equal(found, one)


@needs_compiler
@pytest.mark.parametrize("level", LEVELS[:2])
def test_the_bits_do_not_depend_on_who_lays_the_panels(library, level):
    one, other = (multiply(library(level), form, **case(197, 300, 48)) for form in FORMS)
    assert torch.equal(one, other)


@needs_compiler
def test_nan_and_infinity_go_where_they_belong(multiplied):
    given = case(9, 40, 32)
    x, weight = given["x"], given["weight"]
    x[4, 7], x[2, 3] = torch.nan, torch.inf
    found = multiplied(x, weight)
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
    assert native._packing(x, [torch.empty(24, 24)], torch.float32) is not native.panels
    assert native._packing(x, [torch.empty(24, 24)] * 2, torch.float32) is native.panels
    assert native._packing(x[:, :16], [torch.empty(48, 24)], torch.float32) is None


class Mutant(NamedTuple):
    file: str
    name: str
    old: str
    new: str


SCALED = "scale[i] * Function::value(sums[i] + bias[i])"
MUTANTS = [
    Mutant("panels.cpp", "sums forgotten", "if (begin != 0) {", "if (false) {"),
    Mutant("panels.cpp", "sums of before", "if (begin != 0) {", "if (true) {"),
    Mutant("panels.cpp", "finished too early", "if (begin + depth != p.depth) {", "if (depth < 0) {"),
    Mutant("panels.cpp", "always the first strip", "p.x + row * p.depth + begin", "p.x + begin"),
    Mutant("panels.cpp", "always the first part", "p.x + row * p.depth + begin", "p.x + row * p.depth"),
    Mutant("panels.cpp", "the first part, in panels", "column * p.depth + begin * kWide", "column * p.depth"),
    Mutant("panels.cpp", "the first part, as it is", "column * stride + begin)", "column * stride)"),
    Mutant("panels.cpp", "bias of another panel", "p.bias[first + i]", "p.bias[i]"),
    Mutant("panels.cpp", "LayerScale of another panel", "p.scale[first + i]", "p.scale[i]"),
    Mutant("panels.cpp", "rows of out without a gap", "p.out + row * p.out_stride", "p.out + row * p.width"),
    Mutant("panels.cpp", "activation of the whole sum", f"residual[i] + {SCALED}",
           "Function::value(residual[i] + scale[i] * (sums[i] + bias[i]))"),
    Mutant("panels.cpp", "LayerScale of the whole sum", f"residual[i] + {SCALED}",
           "scale[i] * (residual[i] + Function::value(sums[i] + bias[i]))"),
    Mutant("strip.h", "two steps exchanged", "step(1) = FASTVIT_SHUFFLE(ab, cd, 2, 3, 6, 7)",
           "step(1) = FASTVIT_SHUFFLE(ab, cd, 2, 3, 7, 6)"),
    Mutant("strip.h", "rows of the weight without a gap", "interleave_four(rows + i * stride + j, stride",
           "interleave_four(rows + i * depth + j, depth"),
    Mutant("strip.h", "the last steps left out", "for (; step < depth; ++step) {", "for (; false; ++step) {"),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_faults_show(mutant, tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources, ignore=shutil.ignore_patterns("*.cu*", "*.py", "__pycache__"))
    text = (sources / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    library = compiled("base", tmp_path, sources, "-O1")
    given = case(200, 300, 48) | {"activation": "gelu"}
    truth = expected(**given)
    with pytest.raises(AssertionError):
        for form in FORMS:
            assert right(multiply(library, form, **given), truth)
