"""A norm folded into the product after it, as far as it needs no GPU: maths, what is kept, when it runs."""

import ctypes
import inspect

import op_cases
import plain_ops
import pytest
import test_fc1
import torch
from native_calls import leaves, needs_library
from native_mutants import FOLDING_MUTANTS
from test_fc1 import ACTIVATIONS, HALF, activated, call, compiled, compiled_with, needs_compiler

from fastvit import ops, use_backend
from fastvit.contract import gemm_libraries, judge
from fastvit.ops import choices, native
from fastvit.regimes import pairwise, regimes_of

LINEAR, MLP = "layer_norm_linear", "layer_norm_mlp"
BF16, FP16 = torch.bfloat16, torch.float16
FOUR = ("norm_weight", "norm_bias", "weight", "bias")  # what is folded
EPS = 1e-6
gpu = test_fc1.gpu


@pytest.fixture(scope="module")
def fc1(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("folding"))


def product(x, weight):
    """As a tensor core at its worst: sixteen products exactly, added to a float32 that is cut toward zero."""
    sums = x.new_zeros(len(x), len(weight), dtype=torch.float32)
    for some, others in zip(x.double().split(16, 1), weight.double().split(16, 1), strict=True):
        exact = sums.double() + some @ others.T
        near = exact.float()
        sums = torch.where(near.double().abs() > exact.abs(), near.nextafter(torch.zeros_like(near)), near)
    return sums


def in_kernels(fc1, folded, given, norm, activation):
    """linear(norm(x)) and the activation, as the kernels compute them from what is kept."""
    x = given["x"].flatten(0, 1)
    with torch.no_grad():
        weight, sums, bias = folded(*of(given), x.dtype)
    mean, rstd = torch.empty(len(x)), torch.empty(len(x))
    rms = ctypes.c_int(norm == "rms_norm")
    call(fc1.statistics, x.float(), mean, rstd, *x.shape, ctypes.c_float(EPS), rms)
    y = product(x, weight)
    call(fc1.normalized, y, mean, rstd, sums, bias, y, *y.shape)
    y = activated(fc1, y, activation) if activation else y
    return y.to(x.dtype).view(*given["x"].shape[:2], -1)


def of(given):
    """The arguments of native.folded before the dtype."""
    biases = () if given["bias"] is None else (given["bias"],)
    return given["norm_weight"], given["norm_bias"], (given["weight"],), biases


def check(fc1, folded, given, norm="layer_norm", activation=None):
    """By the contract, against torch's own ops one after the other."""

    def plainly(given):
        h = plain_ops.layer_norm_linear(**given, norm=norm)
        return plain_ops.ACTIVATIONS[activation](h) if activation else h

    out = in_kernels(fc1, folded, given, norm, activation)
    baselines = []
    for _, context in gemm_libraries(out.device):
        with context():
            baselines.append(plainly(given))
    return judge("out", out, plainly(op_cases.float64(given)), baselines, kind="gemm")


def within_contract(*arguments, **options):
    found = check(*arguments, **options)
    assert found.ok, found


def given(dtype, regime="randn", offset=0, **sizes):
    one = op_cases.regime_call(LINEAR, regime, dtype, **{"tokens": 50, "width": 256} | sizes)
    return one | {"x": (one["x"] + offset).to(dtype)}


# Every regime with every kind of norm and activation, or none as the projection of q, k and v has it.
CELLS = pairwise(
    lambda cell: cell["norm"] == "layer_norm" or "norm_bias" in cell["without"],
    dtype=HALF,
    regime=regimes_of(LINEAR, torch.float16),
    norm=("layer_norm", "rms_norm"),
    without=((), ("norm_bias",), ("norm_bias", "norm_weight"), ("norm_bias", "bias"), ("bias",)),
    activation=(*ACTIVATIONS, None),
)


@needs_compiler
@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_regime_is_within_the_contract(fc1, cell):
    one = given(cell["dtype"], cell["regime"]) | dict.fromkeys(cell["without"])
    within_contract(fc1, native.folded, one, cell["norm"], cell["activation"])


# Where sums of a weight that is not yet rounded leave a hundred times torch's error.
@needs_compiler
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [384, 768])
def test_a_mean_of_a_hundred_deviations_is_within_the_contract(fc1, dtype, width):
    within_contract(fc1, native.folded, given(dtype, offset=100, width=width))


# Why a caller and a table are to allow it: no shape tells such rows, for which a norm of its own is right.
@needs_compiler
@pytest.mark.parametrize(("dtype", "offset"), [(FP16, 3000), (BF16, 2000)], ids=str)
def test_a_mean_of_thousands_of_deviations_is_not(fc1, dtype, offset):
    assert not check(fc1, native.folded, given(dtype, offset=offset)).ok


def follows_edits(_, folded):
    """What is kept is derived anew after an edit in place of any of its sources, and after no other."""
    one = given(BF16)
    with torch.no_grad():
        for edited in FOUR:
            before = folded(*of(one), BF16)
            assert all(new is old for new, old in zip(folded(*of(one), BF16)[:2], before, strict=False))
            one[edited][0] += 1
            after = folded(*of(one), BF16)
            assert not all(map(torch.equal, before, after))


def test_an_edit_of_each_parameter_is_seen():
    follows_edits(None, native.folded)


def test_nothing_is_folded_that_cannot_be_kept():
    assert native.folded(*of(given(BF16)), BF16) == []  # gradients are recorded
    with torch.inference_mode():
        assert native.folded(*of(given(BF16)), BF16) == []


CHECKS = {
    "plain": lambda *faulty: within_contract(*faulty, given(FP16)),
    "offset": lambda *faulty: within_contract(*faulty, given(FP16, "mean_offset")),
    "100": lambda *faulty: within_contract(*faulty, given(BF16, offset=100)),
    "small std": lambda *faulty: within_contract(*faulty, given(FP16, "small_std")),
    "edits": follows_edits,
}


@needs_compiler
@pytest.mark.parametrize("name", CHECKS)
def test_green_without_a_fault(fc1, name):
    CHECKS[name](fc1, native.folded)


@needs_compiler
@pytest.mark.parametrize("mutant", FOLDING_MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.fault}")
def test_red_with_a_fault(fc1, mutant, tmp_path):
    if mutant.file == "native.py":
        faulty = fc1, folded_with(mutant)
    else:
        faulty = compiled_with(mutant, tmp_path), native.folded
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](*faulty)


def folded_with(mutant):
    text = inspect.getsource(native.folded)
    assert text.count(mutant.old) == 1, f"it holds {text.count(mutant.old)} times: {mutant.old}"
    names = dict(vars(native))
    exec(text.replace(mutant.old, mutant.new), names)
    return names["folded"]


def test_it_is_used_only_where_it_was_measured_and_rows_are_in_half_precision(gpu):
    x, weight, measured = gpu

    def folds(op=MLP, x=x, dtype=BF16):
        return choices.folds(op, x, (weight,), dtype)

    measured({})  # as fused, which says nothing of this
    assert not folds()
    measured({"options": "folded"})
    assert folds()
    assert not folds(dtype=FP16)  # under autocast of another dtype
    assert not folds(x=x.float())
    assert not folds(LINEAR)
    assert not choices.fuses(x, weight, BF16, "fwd")
    measured({"options": "folded", "ratio": 0.9})
    assert not folds()
    with choices.folding(True):
        assert folds(LINEAR)
        assert not folds(x=x.float(), dtype=torch.float32)
        assert not choices.folds(MLP, torch.empty(1, 2, 768, dtype=BF16), (weight,), BF16)
        with choices.folding(False):
            assert not folds()


@pytest.fixture
def asked(monkeypatch):
    """What the ops have folded, on the CPU's library, which has no kernel that takes it."""
    seen, folded = [], native.folded
    monkeypatch.setattr(choices, "folds", lambda *_: True)
    monkeypatch.setattr(native, "folded", lambda *given: seen.append(folded(*given)) or seen[-1])
    with use_backend("cpp"):
        yield seen


@needs_library()
@pytest.mark.parametrize("op", [LINEAR, MLP])
def test_without_a_kernel_the_norm_is_one_of_its_own(op, asked):
    unscaled = {"layer_scale": False} if op == MLP else {}  # LayerScale is folded as before
    call, function = op_cases.build(op, dtype=torch.float32, tokens=50, **unscaled), getattr(ops, op)
    with torch.no_grad():
        found = function(**call, frozen=True)
        choices.folds = lambda *_: False  # until the fixture ends
        assert torch.equal(found, function(**call, frozen=True))
    assert [len(folded) for folded in asked] == [3]


@needs_library()
@pytest.mark.parametrize(
    ("op", "options"), [(LINEAR, {}), (MLP, {}), (MLP, {"activation": "swiglu", "frozen": True})], ids=str
)
def test_nothing_is_folded_unasked_nor_beside_a_gate(op, options, asked):
    of_op = {key: value for key, value in options.items() if key != "frozen"}
    call = op_cases.build(op, dtype=torch.float32, tokens=50, **of_op)
    with torch.no_grad():
        getattr(ops, op)(**call | options)
    assert asked == []


@needs_library()
@pytest.mark.parametrize("op", [LINEAR, MLP])
def test_nothing_is_folded_while_gradients_are_recorded(op, asked):
    call = leaves(op_cases.build(op, dtype=torch.float32, tokens=50))
    getattr(ops, op)(**call, frozen=True).sum().backward()
    assert call["x"].grad is not None
    assert asked == []
