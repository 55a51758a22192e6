"""layer_norm_mlp: the second half of timm's blocks, with each of timm's MLPs and activations."""

from functools import partial

import op_cases
import pytest
import torch
from op_checks import TIGHT, equal_in_float64, refuses, within_contract
from timm.layers import (
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
)
from torch import nn

from fastvit.ops import layer_norm_mlp
from fastvit.regimes import DTYPES, TOKENS
from fastvit.verification import randomize


@pytest.mark.parametrize("cell", op_cases.cells("layer_norm_mlp"), ids=op_cases.name)
def test_is_the_plain_statement(cell):
    equal_in_float64("layer_norm_mlp", op_cases.build("layer_norm_mlp", **cell))


@pytest.mark.parametrize("cell", op_cases.cells("layer_norm_mlp", dtype=DTYPES), ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("layer_norm_mlp", op_cases.build("layer_norm_mlp", **cell))


# Pairwise; the regime of width 16 fixes it. Dropped: the full product (1536).
GRID = op_cases.regime_cells("layer_norm_mlp", tokens=TOKENS, width=(24, 64, 72, 193), hidden=(64, 101))


@pytest.mark.parametrize("cell", GRID, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    call = op_cases.regime_call("layer_norm_mlp", batch=1, **cell)
    within_contract("layer_norm_mlp", call, offset_regime=cell["regime"] == "mean_offset")


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu, own gate"])
@pytest.mark.parametrize(
    "sizes", [{"width": 1}, {"tokens": 1}, {"hidden": 1}, {"batch": 1}], ids=op_cases.name
)
def test_smallest_sizes(activation, sizes):
    call = op_cases.build("layer_norm_mlp", activation=activation, inner_norm="weight and bias", **sizes)
    equal_in_float64("layer_norm_mlp", call)


MLPS = {
    "gelu": Mlp,
    "gelu_tanh": partial(Mlp, act_layer=GELUTanh),
    "quick_gelu": partial(Mlp, act_layer=QuickGELU),
    "silu": partial(Mlp, act_layer=nn.SiLU),
    "relu": partial(Mlp, act_layer=nn.ReLU),
    "swiglu, packed": SwiGLUPacked,
    "swiglu, packed, gate last": partial(GluMlp, act_layer=nn.SiLU),
    "swiglu, own gate": SwiGLU,
}


# Each of timm's MLPs with and without a norm inside. Dropped: two kinds of norm in one block, which the op
# does not take.
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner_norm", [False, True])
@pytest.mark.parametrize("norm_layer", [LayerNorm, RmsNorm])
def test_is_the_second_half_of_timms_block(mlp, bias, inner_norm, norm_layer):
    theirs = MLPS[mlp](8, hidden_features=12, bias=bias, norm_layer=norm_layer if inner_norm else None)
    norm, scale, drop = norm_layer(8), LayerScale(8), DropPath(0.4)
    for module in (theirs, norm, scale):
        randomize(module.double())
    x = torch.randn(16, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = x + drop(scale(theirs(norm(x))))
    torch.manual_seed(1)
    kept = torch.empty(16, dtype=torch.float64).bernoulli_(0.6) / 0.6
    out = layer_norm_mlp(
        x,
        norm.weight,
        getattr(norm, "bias", None),
        *_projections(theirs, mlp),
        activation=mlp.partition(",")[0],
        norm="layer_norm" if norm_layer is LayerNorm else "rms_norm",
        layer_scale=scale.gamma,
        sample_scale=kept,
        inner_norm_weight=getattr(theirs.norm, "weight", None),
        inner_norm_bias=getattr(theirs.norm, "bias", None),
        **_gate(theirs),
    )
    torch.testing.assert_close(out, expected, **TIGHT)


def _projections(mlp, kind):
    fc1 = mlp.fc1_x if hasattr(mlp, "fc1_x") else mlp.fc1
    first = [fc1.weight, fc1.bias]
    if "gate last" in kind:
        first = [None if t is None else t.roll(len(t) // 2, dims=0) for t in first]
    return *first, mlp.fc2.weight, mlp.fc2.bias


def _gate(mlp):
    return {"gate_weight": mlp.fc1_g.weight, "gate_bias": mlp.fc1_g.bias} if hasattr(mlp, "fc1_g") else {}


def test_activations_are_never_taken_for_one_another():
    call = op_cases.build("layer_norm_mlp")
    outs = [
        layer_norm_mlp(**call | {"activation": name}) for name in ("gelu", "gelu_tanh", "quick_gelu", "silu")
    ]
    distances = torch.pdist(torch.stack(outs).flatten(1), p=torch.inf)
    assert distances.min() > 1e-5


X, ONES = torch.randn(2, 5, 8), torch.ones(8)
FC1, FC2 = torch.randn(12, 8), torch.randn(8, 12)
MIDDLE = torch.ones(12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[0]}, ValueError, "x must be [B, N, D]"),
        ({"x": X.long()}, TypeError, "x must be floating point"),
        ({"fc2_weight": MIDDLE}, ValueError, "fc2_weight must be [D, M]"),
        ({"fc1_weight": FC1[1:]}, ValueError, "fc1_weight must have shape [12, 8]"),
        ({"fc1_weight": MIDDLE}, ValueError, "fc1_weight must have shape [12, 8]"),
        ({"fc1_bias": ONES}, ValueError, "fc1_bias must have shape [12]"),
        ({"fc2_weight": FC2[1:]}, ValueError, "fc2_weight must have shape [8, 12]"),
        ({"fc2_bias": MIDDLE}, ValueError, "fc2_bias must have shape [8]"),
        ({"norm_weight": MIDDLE}, ValueError, "norm_weight must have shape [8]"),
        ({"norm_bias": MIDDLE}, ValueError, "norm_bias must have shape [8]"),
        ({"layer_scale": torch.ones(1)}, ValueError, "layer_scale must have shape [8]"),
        ({"sample_scale": torch.ones(2, 1, 1)}, ValueError, "sample_scale must have shape [2]"),
        ({"inner_norm_weight": ONES}, ValueError, "inner_norm_weight must have shape [12]"),
        ({"inner_norm_bias": MIDDLE}, ValueError, "inner_norm_bias is given, but inner_norm_weight is None"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation is 'tanh'; it must be one of gelu, gelu_tanh, quick_gelu,",
        ),
        ({"activation": "swiglu"}, ValueError, "fc1_weight must have shape [24, 8]"),
        (
            {"gate_weight": FC1},
            ValueError,
            "activation 'gelu' has no gate; pass gate_weight only with swiglu",
        ),
        ({"gate_bias": MIDDLE}, ValueError, "gate_bias is given, but gate_weight is None"),
        ({"activation": "swiglu", "gate_weight": FC1[1:]}, ValueError, "gate_weight must have shape [12, 8]"),
        ({"norm": "batch_norm"}, ValueError, "norm is 'batch_norm'; it must be one of layer_norm, rms_norm"),
        ({"norm": "rms_norm"}, ValueError, "norm_bias must be None"),
        ({"fc1_weight": FC1.half()}, TypeError, "fc1_weight is torch.float16, but x is torch.float32"),
        ({"layer_scale": ONES.double()}, TypeError, "layer_scale is torch.float64"),
        ({"fc2_weight": FC2.to("meta")}, ValueError, "fc2_weight is on meta, but x is on cpu"),
    ],
)
def test_refuses(change, error, words):
    weights = {"norm_weight": ONES, "norm_bias": ONES, "fc1_weight": FC1, "fc2_weight": FC2}
    call = {"x": X, "fc1_bias": None, "fc2_bias": None, **weights}
    refuses("layer_norm_mlp", call | change, error, words)
