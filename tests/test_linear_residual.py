"""linear_residual: a projection, timm's LayerScale, timm's stochastic depth, and the sum."""

import op_cases
import pytest
import torch
from op_checks import TIGHT, equal_in_float64, refuses, within_contract
from timm.layers import DropPath, LayerScale
from torch import nn

from fastvit.ops import linear_residual
from fastvit.regimes import DTYPES, TOKENS
from fastvit.verification import randomize


@pytest.mark.parametrize("cell", op_cases.cells("linear_residual"), ids=op_cases.name)
def test_is_the_plain_statement(cell):
    equal_in_float64("linear_residual", op_cases.build("linear_residual", **cell))


@pytest.mark.parametrize("cell", op_cases.cells("linear_residual", dtype=DTYPES), ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("linear_residual", op_cases.build("linear_residual", **cell))


# Pairwise. Dropped: the full product (384).
GRID = op_cases.regime_cells("linear_residual", tokens=TOKENS, width=(24, 64, 72, 193))


@pytest.mark.parametrize("cell", GRID, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    within_contract("linear_residual", op_cases.regime_call("linear_residual", batch=1, **cell))


@pytest.mark.parametrize(
    "sizes", [{"width": 1}, {"tokens": 1}, {"inner": 1}, {"batch": 1}], ids=op_cases.name
)
def test_smallest_sizes(sizes):
    equal_in_float64("linear_residual", op_cases.build("linear_residual", **sizes))


def test_is_timms_layer_scale_and_drop_path():
    projection = randomize(nn.Linear(12, 8).double())
    scale, drop = randomize(LayerScale(8).double()), DropPath(0.4)
    x, residual = torch.randn(16, 5, 12, dtype=torch.float64), torch.randn(16, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    theirs = residual + drop(scale(projection(x)))
    torch.manual_seed(1)
    kept = torch.empty(16, dtype=torch.float64).bernoulli_(0.6) / 0.6
    ours = linear_residual(
        x, projection.weight, projection.bias, residual, layer_scale=scale.gamma, sample_scale=kept
    )
    assert 0 < kept.count_nonzero() < 16
    torch.testing.assert_close(ours, theirs, **TIGHT)


X, WEIGHT, RESIDUAL = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[0]}, ValueError, "x must be [B, N, K]"),
        ({"x": X.long()}, TypeError, "x must be floating point"),
        ({"weight": WEIGHT[0]}, ValueError, "weight must be [D, K]"),
        ({"weight": WEIGHT[:, 1:]}, ValueError, "weight must have shape [6, 8]"),
        ({"bias": torch.ones(8)}, ValueError, "bias must have shape [6]"),
        ({"residual": RESIDUAL[:1]}, ValueError, "residual must have shape [2, 5, 6]"),
        ({"residual": RESIDUAL[..., 1:]}, ValueError, "residual must have shape [2, 5, 6]"),
        ({"layer_scale": torch.ones(1)}, ValueError, "layer_scale must have shape [6]"),
        ({"sample_scale": torch.ones(2, 1)}, ValueError, "sample_scale must have shape [2]"),
        ({"residual": RESIDUAL.half()}, TypeError, "residual is torch.float16, but x is torch.float32"),
        ({"layer_scale": torch.ones(6).double()}, TypeError, "layer_scale is torch.float64"),
        ({"residual": RESIDUAL.to("meta")}, ValueError, "residual is on meta, but x is on cpu"),
        ({"sample_scale": torch.ones(2, device="meta")}, ValueError, "sample_scale is on meta"),
    ],
)
def test_refuses(change, error, words):
    call = {"x": X, "weight": WEIGHT, "bias": None, "residual": RESIDUAL}
    refuses("linear_residual", call | change, error, words)
