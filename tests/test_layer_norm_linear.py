"""layer_norm_linear: torch's norm and torch's projection, as timm's blocks put them one after the other."""

import op_cases
import pytest
import torch
from op_checks import TIGHT, equal_in_float64, refuses, within_contract
from timm.layers import LayerNorm, RmsNorm
from timm.models.vision_transformer import Block

from fastvit.ops import layer_norm_linear
from fastvit.regimes import DTYPES, TOKENS
from fastvit.verification import randomize


@pytest.mark.parametrize("cell", op_cases.cells("layer_norm_linear"), ids=op_cases.name)
def test_is_the_plain_statement(cell):
    equal_in_float64("layer_norm_linear", op_cases.build("layer_norm_linear", **cell))


@pytest.mark.parametrize("cell", op_cases.cells("layer_norm_linear", dtype=DTYPES), ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("layer_norm_linear", op_cases.build("layer_norm_linear", **cell))


# Pairwise; the regime of width 16 fixes it. Dropped: the full product (768).
GRID = op_cases.regime_cells("layer_norm_linear", tokens=TOKENS, width=(24, 64, 72, 193))


@pytest.mark.parametrize("cell", GRID, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    call = op_cases.regime_call("layer_norm_linear", batch=1, **cell)
    within_contract("layer_norm_linear", call, offset_regime=cell["regime"] == "mean_offset")


def test_a_large_mean_does_not_overflow_float16():
    call = op_cases.build("layer_norm_linear", dtype=torch.float16, width=64)
    call["x"] += 1000
    within_contract("layer_norm_linear", call)


# The smallest widths, where a norm has least to go by: of one channel layer_norm leaves the bias alone.
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("sizes", [{"width": 1}, {"tokens": 1}, {"out": 1}, {"width": 2}], ids=op_cases.name)
def test_smallest_sizes(norm, sizes):
    affine = "weight and bias" if norm == "layer_norm" else "weight"
    equal_in_float64(
        "layer_norm_linear", op_cases.build("layer_norm_linear", norm=norm, affine=affine, **sizes)
    )


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("norm_layer", "norm"), [(LayerNorm, "layer_norm"), (RmsNorm, "rms_norm")])
def test_is_the_first_half_of_timms_attention(norm_layer, norm, qkv_bias):
    block = randomize(Block(24, 3, qkv_bias=qkv_bias, norm_layer=norm_layer).double())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    own_bias = getattr(block.norm1, "bias", None)
    weights = block.norm1.weight, own_bias, block.attn.qkv.weight, block.attn.qkv.bias
    out = layer_norm_linear(x, *weights, eps=block.norm1.eps, norm=norm)
    torch.testing.assert_close(out, block.attn.qkv(block.norm1(x)), **TIGHT)


X, ONES, WEIGHT = torch.randn(2, 5, 8), torch.ones(8), torch.randn(6, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[0]}, ValueError, "x must be [B, N, D]"),
        ({"x": X.long()}, TypeError, "x must be floating point"),
        ({"weight": WEIGHT[0]}, ValueError, "weight must be [O, D]"),
        ({"weight": WEIGHT[:, 1:]}, ValueError, "weight must have shape [6, 8]"),
        ({"norm_weight": ONES[1:]}, ValueError, "norm_weight must have shape [8]"),
        ({"norm_bias": ONES[None]}, ValueError, "norm_bias must have shape [8]"),
        ({"bias": ONES}, ValueError, "bias must have shape [6]"),
        ({"weight": WEIGHT.half()}, TypeError, "weight is torch.float16, but x is torch.float32"),
        ({"norm_weight": ONES.double()}, TypeError, "norm_weight is torch.float64"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, but x is on cpu"),
        ({"norm": "batch_norm"}, ValueError, "norm is 'batch_norm'; it must be one of layer_norm, rms_norm"),
        ({"norm": "rms_norm"}, ValueError, "norm_bias must be None"),
    ],
)
def test_refuses(change, error, words):
    call = {"x": X, "norm_weight": ONES, "norm_bias": ONES, "weight": WEIGHT}
    refuses("layer_norm_linear", call | change, error, words)
