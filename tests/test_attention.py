"""attention: torch's and timm's, with every option, on every shape and on data that shows faults."""

import op_cases
import pytest
import torch
import torch.nn.functional as F
from op_checks import TIGHT, equal_in_float64, refuses, within_contract
from timm.layers import (
    Attention,
    AttentionRope,
    LayerNorm,
    RmsNorm,
    RotaryEmbeddingDinoV3,
    apply_rot_embed_cat,
)

from fastvit import reference
from fastvit.contract import judge
from fastvit.ops import attention
from fastvit.regimes import DTYPES, HEAD_DIMS, TOKENS
from fastvit.verification import randomize


@pytest.mark.parametrize("cell", op_cases.cells("attention"), ids=op_cases.name)
def test_is_the_plain_statement(cell):
    equal_in_float64("attention", op_cases.build("attention", **cell))


@pytest.mark.parametrize("cell", op_cases.cells("attention", dtype=DTYPES), ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("attention", op_cases.build("attention", **cell))


# Pairwise over data, dtypes, tokens and head dims; to the contract's own are added odd ones and, among the
# multiples of 8, the one that it leaves out. Dropped: what a regime does not concern, and the full product,
# which is 2640.
GRID = op_cases.regime_cells("attention", tokens=TOKENS, head_dim=(*HEAD_DIMS, 1, 33, 104))


@pytest.mark.parametrize("cell", GRID, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    call = op_cases.regime_call("attention", batch=1, **cell)
    within_contract("attention", call, floor_only=cell["tokens"] <= 2)


# One token attends to itself alone, whatever its query: dq and dk are exactly zero, and a ratio to torch's
# own error says nothing. Dropped: transposed gradients, which are compared at ordinary sizes.
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("ones", [False, True], ids=["random", "sum"])
def test_gradients_that_vanish(tokens, ones):
    call = op_cases.build("attention", dtype=torch.float32, tokens=tokens)
    qkv = call["qkv"].requires_grad_()
    out = attention(qkv, 2)
    grad = torch.ones(()).expand(out.shape) if ones else torch.randn(out.shape)
    (ours,) = torch.autograd.grad(out, qkv, grad)
    oracle, scale = _gradient_and_scale(qkv.detach().double(), grad.double())
    for part, kind in enumerate(("dq", "op", "op")):
        mine, true, size = (t.unflatten(-1, (3, -1))[:, :, part] for t in (ours, oracle, scale))
        check = judge(f"d{'qkv'[part]}", mine, true, kind=kind, scale=size, floor_only=True)
        assert check.ok, check
    assert tokens > 1 or oracle[..., :32].count_nonzero() == 0


def _gradient_and_scale(qkv, grad):
    """d(qkv) by the formula, and the same products taken with absolute values; two heads."""
    (q, k, v), do = (t.unflatten(-1, (-1, 2, 8)).movedim((2, 3), (0, 2)) for t in (qkv, grad))
    do, scale = do[0], 8**-0.5
    p = (q @ k.mT * scale).softmax(-1)
    large = p * (q.abs() @ k.abs().mT * scale).clamp(min=1)
    dp, dp_large = do @ v.mT, do.abs() @ v.abs().mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    ds_large = large * (dp_large + (dp_large * p).sum(-1, keepdim=True)) * scale
    exact = torch.stack([ds @ k, ds.mT @ q, p.mT @ do])
    sizes = torch.stack([ds_large @ k.abs(), ds_large.mT @ q.abs(), large.mT @ do.abs()])
    return (t.movedim((0, 2), (2, 3)).flatten(2) for t in (exact, sizes))


# Every mask with every norm. Dropped: head counts and widths, which the plain statement covers.
@pytest.mark.parametrize("norm_layer", [None, LayerNorm, RmsNorm], ids=["no norm", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_is_timms_attention(norm_layer, mask):
    theirs = Attention(24, 3, qkv_bias=True, qk_norm=norm_layer is not None, norm_layer=norm_layer).double()
    randomize(theirs)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    call = op_cases.build("attention", tokens=7, heads=3, mask=mask)
    masks = {name: call[name] for name in ("attn_mask", "is_causal")}
    out = theirs.proj(attention(theirs.qkv(x), 3, **masks, **_norms(theirs)))
    torch.testing.assert_close(out, theirs(x, **masks), **TIGHT)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_is_timms_rotary_attention(layout, prefix):
    half = layout == "half"
    settings = {"qkv_bias": True, "qk_norm": True, "norm_layer": LayerNorm}
    theirs = AttentionRope(32, 2, num_prefix_tokens=prefix, rotate_half=half, **settings).double()
    randomize(theirs)
    x = torch.randn(2, 6 + prefix, 32, dtype=torch.float64)
    rope = RotaryEmbeddingDinoV3(16, rotate_half=half).get_embed([2, 3]).double()
    sin, cos = rope.chunk(2, dim=-1)
    tables = {"rope_cos": cos, "rope_sin": sin, "rope_layout": layout, "num_prefix_tokens": prefix}
    out = theirs.proj(attention(theirs.qkv(x), 2, **tables, **_norms(theirs)))
    torch.testing.assert_close(out, theirs(x, rope=rope), **TIGHT)


def _norms(module):
    if not hasattr(module.q_norm, "weight"):
        return {}
    norms = {"qk_norm": "rms_norm" if isinstance(module.q_norm, RmsNorm) else "layer_norm"}
    for part in "qk":
        norm = getattr(module, f"{part}_norm")
        norms |= {f"{part}_norm_weight": norm.weight, f"{part}_norm_bias": getattr(norm, "bias", None)}
    return norms | {"qk_norm_eps": module.q_norm.eps}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotates_as_timm_does_in_half_precision(layout, dtype):
    qkv = torch.randn(1, 4, 3 * 8).to(dtype)
    rope = torch.randn(4, 16)
    q, k, v = qkv.unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
    q, k = (apply_rot_embed_cat(t, rope, half=layout == "half") for t in (q, k))
    out = attention(qkv, 1, rope_cos=rope[:, 8:], rope_sin=rope[:, :8], rope_layout=layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v)[:, 0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["bool", "float", "keys", "keys and causal"])
def test_wholly_masked_rows_are_zero_with_finite_gradients(dtype, mask):
    attended = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
    additive = torch.zeros(3, 3, dtype=dtype).masked_fill(~attended, -torch.inf)
    first_hidden = torch.tensor([[False, True, True]] * 2)
    masks, dead = {
        "bool": ({"attn_mask": attended}, (slice(None), 1)),
        "float": ({"attn_mask": additive}, (slice(None), 1)),
        "keys": ({"key_mask": torch.tensor([[True] * 3, [False] * 3])}, (1,)),
        "keys and causal": ({"key_mask": first_hidden, "is_causal": True}, (slice(None), 0)),
    }[mask]
    qkv = torch.randn(2, 3, 24).to(dtype).requires_grad_()
    out = attention(qkv, 2, **masks)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    alive = torch.ones(2, 3, dtype=torch.bool)
    alive[dead] = False
    assert out[dead].count_nonzero() == 0
    assert gradient.isfinite().all()
    assert (out[alive] != 0).all()
    # The query of such a row moves nothing, and must not be told that it did.
    assert gradient[dead][..., :8].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("part", range(3), ids="qkv".__getitem__)
def test_is_finite_where_torchs_own_is(dtype, value, part):
    qkv = torch.randn(2, 5, 3, 2, 4).to(dtype)
    untouched = attention(qkv.flatten(2), 2)
    qkv[0, 1, part, 0, 2] = value
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    # In float64 the formula decides: torch's own CPU kernel answers a query of NaN with zeros.
    formula = dtype == torch.float64
    theirs = (q @ k.mT / 2).softmax(-1) @ v if formula else F.scaled_dot_product_attention(q, k, v)
    theirs = theirs.transpose(1, 2).flatten(2)
    ours = attention(qkv.flatten(2), 2)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    # One head of one image, and of a query one row: nothing else may notice.
    reached = torch.zeros_like(ours, dtype=torch.bool)
    reached[0, 1 if part == 0 else slice(None), :4] = True
    torch.testing.assert_close(ours[~reached], untouched[~reached])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_draws_as_torch_does(dtype):
    qkv = torch.randn(2, 5, 24, dtype=dtype)
    q, k, v = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    torch.manual_seed(3)
    theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4).transpose(1, 2).flatten(2)
    torch.manual_seed(3)
    ours = attention(qkv, 2, dropout_p=0.4)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, attention(qkv, 2))


# What the public op cannot ask for: other keys than queries. Only the reference takes them as yet.
@pytest.mark.parametrize("mask", [None, "bool", "causal", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_attends_to_other_tokens(mask, dtype):
    q, k, v = torch.randn(2, 3, 2, 4, dtype=dtype), *torch.randn(2, 2, 5, 2, 4, dtype=dtype)
    attended, keys = torch.rand(3, 5) > 0.3, torch.rand(2, 5) > 0.3
    ours, theirs = {
        None: ({}, {}),
        "bool": ({"attn_mask": attended}, {"attn_mask": attended}),
        "causal": ({"is_causal": True}, {"is_causal": True}),
        "keys": ({"key_mask": keys}, {"attn_mask": keys[:, None, None]}),
    }[mask]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **theirs)
    torch.testing.assert_close(reference.attention(q, k, v, **ours), expected.transpose(1, 2).flatten(2))


QKV = torch.randn(2, 5, 3 * 2 * 8)
TABLE = torch.randn(5, 8)
BOOL = torch.ones(5, 5, dtype=torch.bool)
ROPE = {"rope_cos": TABLE, "rope_sin": TABLE}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": QKV[0]}, ValueError, "qkv must be [B, N, 3*H*d]"),
        ({"qkv": QKV.long()}, TypeError, "qkv must be floating point"),
        ({"num_heads": 5}, ValueError, "5 heads do not divide qkv's width 48"),
        ({"num_heads": 0}, ValueError, "0 heads do not divide"),
        ({"qkv": QKV[..., :0]}, ValueError, "width 0"),
        ({"attn_mask": BOOL, "is_causal": True}, ValueError, "is_causal and attn_mask exclude each other"),
        ({"attn_mask": BOOL[:4]}, ValueError, "attn_mask must be [N, N] = [5, 5]"),
        ({"attn_mask": BOOL[0]}, ValueError, "attn_mask must be [N, N] = [5, 5]"),
        (
            {"attn_mask": BOOL.expand(3, 1, 5, 5)},
            ValueError,
            "up to [B, H, N, N] = [2, 2, 5, 5]; its shape is [3,",
        ),
        ({"attn_mask": BOOL.expand(1, 1, 1, 5, 5)}, ValueError, "attn_mask must be"),
        ({"attn_mask": BOOL.long()}, TypeError, "attn_mask must be bool or floating point"),
        ({"attn_mask": BOOL.double()}, TypeError, "attn_mask is torch.float64, but qkv is torch.float32"),
        ({"attn_mask": BOOL.to("meta")}, ValueError, "attn_mask is on meta, but qkv is on cpu"),
        ({"key_mask": BOOL}, ValueError, "key_mask must have shape [2, 5]"),
        ({"key_mask": BOOL[:2].float()}, TypeError, "key_mask must be bool"),
        ({"key_mask": BOOL[:2].to("meta")}, ValueError, "key_mask is on meta"),
        (
            {"qk_norm": "batch_norm"},
            ValueError,
            "qk_norm is 'batch_norm'; it must be one of layer_norm, rms_norm",
        ),
        ({"q_norm_weight": torch.ones(8)}, ValueError, "q_norm_weight is given, but qk_norm is None"),
        ({"qk_norm": "rms_norm", "k_norm_bias": torch.ones(8)}, ValueError, "k_norm_bias must be None"),
        (
            {"qk_norm": "rms_norm", "k_norm_weight": torch.ones(9)},
            ValueError,
            "k_norm_weight must have shape [8]",
        ),
        (
            {"qk_norm": "rms_norm", "q_norm_weight": torch.ones(8).half()},
            TypeError,
            "q_norm_weight is torch.float16",
        ),
        ({"rope_cos": TABLE}, ValueError, "rope_cos and rope_sin go together"),
        ({"rope_sin": TABLE}, ValueError, "rope_cos and rope_sin go together"),
        (ROPE | {"num_heads": 16}, ValueError, "an even head_dim; it is 1"),
        (
            ROPE | {"rope_layout": "whole"},
            ValueError,
            "rope_layout is 'whole'; it must be one of half, interleaved",
        ),
        (ROPE | {"num_prefix_tokens": 1}, ValueError, "rope_cos must be [N - P, d] = [4, 8]"),
        (ROPE | {"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens is -1; it must be 0 to N = 5"),
        ({"num_prefix_tokens": 6}, ValueError, "num_prefix_tokens is 6"),
        (ROPE | {"rope_sin": TABLE.expand(3, 1, 5, 8)}, ValueError, "rope_sin must be [N - P, d]"),
        (ROPE | {"rope_sin": TABLE[0]}, ValueError, "rope_sin must be [N - P, d]"),
        (ROPE | {"rope_sin": TABLE.long()}, TypeError, "rope_sin must be floating point"),
        (ROPE | {"rope_sin": TABLE.to("meta")}, ValueError, "rope_sin is on meta"),
    ],
)
def test_refuses(change, error, words):
    refuses("attention", {"qkv": QKV, "num_heads": 2} | change, error, words)
