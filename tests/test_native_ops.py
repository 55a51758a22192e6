"""The compiled CPU ops: output, saved statistics and gradients by the contract, and exact in float64."""

import op_cases
import plain_ops
import pytest
import torch
from native_calls import DTYPES, FIXED, OPS, THROUGH, frozen, needs_library, while_training
from op_checks import GRADS, TIGHT, equal_in_float64, gradients, gradients_within_contract, within_contract
from test_op_gradients import SMALL
from torch.autograd import gradcheck

from fastvit import ops, use_backend
from fastvit.contract import judge_saved
from fastvit.regimes import regimes_of

pytestmark = needs_library()
MLP = "layer_norm_mlp"
TOKENS = (1, 2, 17, 50, 197, 257)
AXES = {
    "layer_norm_linear": {"width": (16, 192, 193, 384, 768, 1024)},
    "linear_residual": {"width": (16, 192, 193, 384, 768, 1024)},
    MLP: {
        "width": (16, 192, 193, 384, 768, 1024),
        "hidden": (64, 102, 256),
        "activation": op_cases.OPTIONS[MLP]["activation"],
    },
}


@pytest.fixture(autouse=True)
def _cpp():
    with use_backend("cpp"):
        yield


def _served(cell):
    return cell["dtype"] in DTYPES


def _soon(cell):
    return _served(cell) and cell["tokens"] * cell["width"] <= 197 * 384


# Pairwise over data, dtypes, tokens, widths and activations. Dropped: float16, which the library does not
# take; the full product; in gradients, whose oracle is slow, many tokens of a large width.
FORWARD = [(op, c) for op in OPS for c in op_cases.regime_cells(op, _served, tokens=TOKENS, **AXES[op])]
BACKWARD = [
    (op, c)
    for op in OPS
    for c in op_cases.regime_cells(op, _soon, tokens=TOKENS, grad=tuple(GRADS), **AXES[op])
]
CELLS = [(op, cell) for op in OPS for cell in op_cases.cells(op)]


@pytest.mark.parametrize(("op", "cell"), FORWARD, ids=op_cases.name)
def test_every_regime_is_within_the_contract(op, cell):
    # Sixteen numbers do not tell how large an error is; eight rows are still among the few of MKL.
    batch = 8 if cell["tokens"] == 1 else 1
    call, offset = op_cases.regime_call(op, batch=batch, **cell), cell["regime"] == "mean_offset"
    for function in (None, while_training(op), frozen(op)):
        within_contract(op, call, function, offset_regime=offset)


@pytest.mark.parametrize(("op", "cell"), BACKWARD, ids=op_cases.name)
def test_every_regimes_gradients_are_within_the_contract(op, cell):
    cell, offset = dict(cell), cell["regime"] == "mean_offset"
    grad = GRADS[cell.pop("grad")]
    width = 16 if cell["regime"] == "width_16" else cell["width"]
    calls = [op_cases.regime_call(op, batch=1, seed=seed, **cell) for seed in range(-(-192 // width))]
    how = {"without": FIXED, "through": THROUGH.get(op, ())}
    gradients_within_contract(op, calls, grad, offset_regime=offset, **how)


# Options pairwise with dtypes and kinds of gradient, at sizes that are multiples of nothing and large enough
# to tell how large an error is.
OPTIONS = [(op, c) for op in OPS for c in op_cases.cells(op, dtype=DTYPES, grad=tuple(GRADS))]
SIZES = {
    "layer_norm_linear": {"width": 259, "out": 201},
    "linear_residual": {"width": 259},
    MLP: {"width": 259, "hidden": 190},
}


@pytest.mark.parametrize(("op", "cell"), OPTIONS, ids=op_cases.name)
def test_every_option_is_within_the_contract(op, cell):
    call = op_cases.build(
        op, batch=3, tokens=13, **SIZES[op], **{k: v for k, v in cell.items() if k != "grad"}
    )
    if call.get("sample_scale") is not None:
        # As stochastic depth has them. Of others a sum of ones says nothing: every column is the same.
        call["sample_scale"] = torch.tensor([0, 1.25, 1.25], dtype=cell["dtype"])
    for function in (None, while_training(op), frozen(op)):
        within_contract(op, call, function)
    how = {"without": FIXED, "through": THROUGH.get(op, ())}
    gradients_within_contract(op, call, GRADS[cell["grad"]], **how)


# As many as a batch of 64 images has. Dropped: half precision, whose rounding hides the sum's own.
@pytest.mark.parametrize("op", OPS)
def test_gradients_that_are_sums_over_many_rows_are_within_the_contract(op):
    sizes = {"hidden": 64} if op == MLP else {}
    call = op_cases.regime_call(op, "randn", torch.float32, batch=64, tokens=197, width=64, **sizes)
    gradients_within_contract(op, call, GRADS["contiguous"], without=FIXED)


def _saved(op, call):
    """What the registered op saves for backward."""
    names = ("x", "norm_weight", "norm_bias")
    if op == MLP:
        names += ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate_weight", "gate_bias")
        names += ("inner_norm_weight", "inner_norm_bias", "layer_scale", "sample_scale")
        options = (1e-6, call.get("activation", "gelu"), call.get("norm", "layer_norm"))
    else:
        options = (1e-6, call.get("norm", "layer_norm"))
    with torch.no_grad():
        tensors, flags = [call.get(name) for name in names], (False, True)  # not frozen, and save
        if op == "layer_norm_linear":
            tensors += [[call["weight"]], [bias for bias in (call["bias"],) if bias is not None]]
            flags = (True, False)
        return getattr(torch.ops.fastvit, f"{op}_fwd")(*tensors, *options, call["x"].dtype, *flags)[1]


def _statistics_within_contract(rows, mean, rstd, norm="layer_norm"):
    rows = rows.double().flatten(0, -2)
    centre = rows.mean(-1, keepdim=True) if norm == "layer_norm" else 0
    checks = [judge_saved("rstd", rstd, ((rows - centre).square().mean(-1) + 1e-6).rsqrt())]
    if norm == "layer_norm":
        checks.append(judge_saved("mean", mean, rows.mean(-1), scale=rows.abs().mean(-1)))
    assert all(check.ok for check in checks), checks


@pytest.mark.parametrize("op", ["layer_norm_linear", MLP])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("name", regimes_of("layer_norm_linear", torch.float32))
def test_saved_statistics_are_within_the_contract(op, dtype, norm, name):
    call = op_cases.regime_call(op, regime=name, dtype=dtype, tokens=50, width=193) | {"norm": norm}
    call["norm_bias"] = call["norm_bias"] if norm == "layer_norm" else None
    mean, rstd = _saved(op, call)[:2]
    assert mean.shape == ((0,) if norm == "rms_norm" else rstd.shape)
    _statistics_within_contract(call["x"], mean, rstd, norm)


# In float32: in half precision the rows that it is of are rounded, and saved nowhere.
def test_saved_statistics_of_the_inner_norm_are_within_the_contract():
    call = op_cases.build(MLP, dtype=torch.float32, tokens=50, inner_norm="weight and bias", hidden=101)
    *_, before, mean, rstd, _ = _saved(MLP, call)
    _statistics_within_contract(plain_ops.ACTIVATIONS["gelu"](before.double()), mean, rstd)


@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
def test_is_the_plain_statement(op, cell):
    call = op_cases.build(op, **cell)
    equal_in_float64(op, call)
    with torch.no_grad():
        equal_in_float64(op, call)


@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
def test_finite_differences(op, cell):
    call = op_cases.build(op, **cell | SMALL[op])
    names, given = zip(*((n, t) for n, t in op_cases.tensors(call).items() if n not in FIXED), strict=True)

    def function(*values):
        return getattr(ops, op)(**call | dict(zip(names, values, strict=True)))

    assert gradcheck(function, [tensor.requires_grad_() for tensor in given])
    found, expected = (gradients(f, call, GRADS["transposed"], FIXED) for f in _both(op))
    torch.testing.assert_close(found, expected, **TIGHT)


def _both(op):
    return getattr(ops, op), getattr(plain_ops, op)
