"""Gradients of the five ops: the true ones in float64, within the contract in float32, and none unasked."""

import op_cases
import pytest
import torch
from op_checks import GRADS, TIGHT, gives_what_is_needed, gradients, gradients_within_contract
from torch.autograd import gradcheck, gradgradcheck

from fastvit import ops
from fastvit.regimes import DTYPES, OPS

# As small as the options allow: a finite difference costs two calls an element.
SMALL = {
    "patch_embed": {"batch": 2, "grid": (1, 2), "channels": 1, "width": 2},
    "layer_norm_linear": {"tokens": 2, "width": 3, "out": 2},
    "attention": {"batch": 1, "tokens": 4, "head_dim": 4},
    "linear_residual": {"tokens": 2, "width": 3, "inner": 4},
    "layer_norm_mlp": {"tokens": 2, "width": 3, "hidden": 4},
}
CELLS = [(op, cell) for op in OPS for cell in op_cases.cells(op)]


# Dropped: the inner width of linear_residual, a size that SMALL fixes (it is why SMALL comes last).
@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
def test_finite_differences(op, cell):
    call = op_cases.build(op, **cell | SMALL[op])
    names, leaves = zip(*op_cases.tensors(call).items(), strict=True)

    def function(*values):
        return getattr(ops, op)(**call | dict(zip(names, values, strict=True)))

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert gradcheck(function, leaves)
    # Random directions instead of every element: second differences of every pair would take minutes.
    assert gradgradcheck(function, leaves, fast_mode=True)


# Pairwise with the kind of gradient too, so that each option meets each. Dropped: half precision, where
# torch's own weight gradients are too far off to be a yardstick.
@pytest.mark.parametrize(
    ("op", "cell"),
    [(op, cell) for op in OPS for cell in op_cases.cells(op, grad=tuple(GRADS))],
    ids=op_cases.name,
)
def test_within_the_contract(op, cell):
    call = op_cases.build(op, dtype=torch.float32, **{k: v for k, v in cell.items() if k != "grad"})
    gradients_within_contract(op, call, GRADS[cell["grad"]])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["sum", "transposed"])
def test_strided_gradients_equal_contiguous_ones(op, kind):
    call = op_cases.build(op, **op_cases.FULL[op])
    strided = gradients(getattr(ops, op), call, GRADS[kind])
    contiguous = gradients(getattr(ops, op), call, lambda out: GRADS[kind](out).contiguous())
    torch.testing.assert_close(strided, contiguous, **TIGHT)


# What each mask ranges over: what a model trains or passes on. Dropped, to keep 2^k small: the gate's and the
# inner norm's biases, and sample_scale where there is much else.
TRAINED = {
    "patch_embed": ("images", "weight", "bias", "pos_embed", "prefix"),
    "layer_norm_linear": ("x", "norm_weight", "norm_bias", "weight", "bias"),
    "attention": (
        "qkv",
        "q_norm_weight",
        "q_norm_bias",
        "k_norm_weight",
        "k_norm_bias",
        "rope_cos",
        "rope_sin",
    ),
    "linear_residual": ("x", "weight", "bias", "residual", "layer_scale", "sample_scale"),
    "layer_norm_mlp": (
        *("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale"),
        *("gate_weight", "inner_norm_weight"),
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_every_mask_of_needed_gradients(op):
    call = op_cases.build(op, **op_cases.FULL[op] | SMALL[op])
    everything = gradients(getattr(ops, op), call, GRADS["contiguous"])
    gives_what_is_needed(op, call, TRAINED[op], everything, **TIGHT)


# Every dtype, because each takes another path inside torch. Dropped: the options, which only add operands.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["simple", "full"])
def test_empty_batch(op, dtype, options):
    call = op_cases.build(op, dtype=dtype, batch=0, **op_cases.FULL[op] if options == "full" else {})
    full = op_cases.build(op, dtype=dtype, batch=2, **op_cases.FULL[op] if options == "full" else {})
    out = getattr(ops, op)(**call)
    assert out.shape == (0, *getattr(ops, op)(**full).shape[1:])
    assert out.dtype == dtype
    for name, gradient in gradients(getattr(ops, op), call, GRADS["contiguous"]).items():
        assert gradient.shape == call[name].shape
        assert gradient.count_nonzero() == 0
