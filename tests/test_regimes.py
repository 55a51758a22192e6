"""Each regime shows the fault that it is for, and right code passes in all of them."""

from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from fastvit.contract import judge
from fastvit.gemm_libraries import gemm_libraries
from fastvit.regimes import DTYPES, HEAD_DIMS, OPS, REGIMES, TOKENS, float64, pairwise, regimes_of

FP32, FP16, BF16 = DTYPES
JUDGED = ("attention", "layer_norm_linear", "layer_norm_mlp")


def _attention(q, k, v, attn_mask=None, *, scale=1.0, tail_mask=True):
    """Attention by explicit products in float32, or in float64 for the oracle; rounded once, at the end."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, FP32)
    q, k, v = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    logits = q @ k.mT * (scale * q.shape[-1] ** -0.5)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.to(wide)
    if not tail_mask:
        past = -logits.shape[-1] % 64
        logits, v = F.pad(logits, (0, past)), F.pad(v, (0, 0, 0, past))
    weights = logits.softmax(-1).nan_to_num(0)  # a wholly masked row gives zeros
    return (weights @ v).transpose(1, 2).flatten(2).to(dtype)


def _layer_norm(x, weight, bias, *, eps=1e-6, unbiased=0, statistics=None):
    wide = statistics or torch.promote_types(x.dtype, FP32)
    x, weight, bias, dtype = x.to(wide), weight.to(wide), bias.to(wide), x.dtype
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - unbiased)
    return (centred * (variance + eps).rsqrt() * weight + bias).to(dtype)


def _linear(x, weight, bias, *, accumulator=None):
    """The sum over K by chunks, in float32 or wider unless an accumulator is given."""
    wide = torch.promote_types(x.dtype, FP32)
    total = torch.zeros((), dtype=wide)
    for x_chunk, weight_chunk in zip(x.split(16, -1), weight.split(16, -1), strict=True):
        total = (total + F.linear(x_chunk.to(wide), weight_chunk.to(wide))).to(accumulator or wide).to(wide)
    return (total + bias.to(wide)).to(x.dtype)


def _layer_norm_linear(x, norm_weight, norm_bias, weight, bias, *, accumulator=None, **norm):
    return _linear(_layer_norm(x, norm_weight, norm_bias, **norm), weight, bias, accumulator=accumulator)


def _layer_norm_mlp(x, norm_weight, norm_bias, *, layer_scale, gelu="none", accumulator=None, **rest):
    fc1, fc2 = ([rest.pop(f"{name}_weight"), rest.pop(f"{name}_bias")] for name in ("fc1", "fc2"))
    hidden = _layer_norm_linear(x, norm_weight, norm_bias, *fc1, accumulator=accumulator, **rest)
    return x + layer_scale * _linear(F.gelu(hidden, approximate=gelu), *fc2, accumulator=accumulator)


BY_HAND = {
    "attention": _attention,
    "layer_norm_linear": _layer_norm_linear,
    "layer_norm_mlp": _layer_norm_mlp,
}


def _call(function, change, inputs):
    return function(**inputs, **change)


def _torchs_own(op, inputs):
    if op == "attention":
        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.get("attn_mask"))
        return out.transpose(1, 2).flatten(2)
    x = inputs["x"]
    tokens = F.layer_norm(x, x.shape[-1:], inputs["norm_weight"], inputs["norm_bias"], 1e-6)
    if op == "layer_norm_linear":
        return F.linear(tokens, inputs["weight"], inputs["bias"])
    hidden = F.gelu(F.linear(tokens, inputs["fc1_weight"], inputs["fc1_bias"]))
    return x + inputs["layer_scale"] * F.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"])


def _what_cancels(q, k, v, attn_mask=None):
    """Attention with absolute values, where an error in a logit counts as large as the logit."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.double()
    weights = F.scaled_dot_product_attention(q, k, torch.eye(k.shape[2], dtype=q.dtype), attn_mask=mask)
    logits = q.abs() @ k.abs().mT * q.shape[-1] ** -0.5
    return (weights * logits.clamp(min=1) @ v.abs()).transpose(1, 2).flatten(2)


def _judge(op, regime, dtype, implementation, tokens=50, **sizes):
    inputs = REGIMES[regime].inputs(op, dtype, tokens=tokens, **sizes)
    baselines = []
    for _, context in gemm_libraries("cpu"):
        with context():
            baselines.append(_torchs_own(op, inputs))
    exact = float64(inputs)
    floor_only = op == "attention" and tokens <= 2
    return judge(
        f"{op}, {regime}",
        implementation(inputs),
        BY_HAND[op](**exact),
        baselines,
        kind="op" if op == "attention" else "gemm",
        scale=_what_cancels(**exact) if floor_only else None,
        offset_regime=regime == "mean_offset",
        floor_only=floor_only,
    )


CELLS = [(op, regime, dtype) for op in JUDGED for dtype in DTYPES for regime in regimes_of(op, dtype)]


@pytest.mark.parametrize(("op", "regime", "dtype"), CELLS, ids=str)
def test_right_code_passes_in_every_regime(op, regime, dtype):
    for tokens in (1, 2, 50, 197):
        for implementation in (partial(_torchs_own, op), partial(_call, BY_HAND[op], {})):
            check = _judge(op, regime, dtype, implementation, tokens)
            assert check.ok, check


MUTANTS = [
    # fault, op, what is changed, the regime that shows it, in which dtypes
    ("tail mask dropped", "attention", {"tail_mask": False}, "logits_negative", DTYPES),
    ("scale x1.001", "attention", {"scale": 1.001}, "randn", (FP32, FP16)),
    ("eps 1e-5 for 1e-6", "layer_norm_linear", {"eps": 1e-5}, "small_std", DTYPES),
    ("eps 1e-5 for 1e-6", "layer_norm_mlp", {"eps": 1e-5}, "small_std", DTYPES),
    ("unbiased variance", "layer_norm_linear", {"unbiased": 1}, "width_16", DTYPES),
    ("unbiased variance", "layer_norm_mlp", {"unbiased": 1}, "width_16", DTYPES),
    ("statistics in bf16", "layer_norm_linear", {"statistics": BF16}, "mean_offset", DTYPES),
    ("statistics in bf16", "layer_norm_mlp", {"statistics": BF16}, "mean_offset", DTYPES),
    ("statistics in fp16", "layer_norm_mlp", {"statistics": FP16}, "mean_offset", (FP16,)),
    ("accumulator in bf16", "layer_norm_linear", {"accumulator": BF16}, "randn", DTYPES),
    ("accumulator in bf16", "layer_norm_mlp", {"accumulator": BF16}, "randn", DTYPES),
    ("tanh for erf", "layer_norm_mlp", {"gelu": "tanh"}, "randn", (FP32,)),
]


@pytest.mark.parametrize(("fault", "op", "change", "regime", "dtypes"), MUTANTS)
def test_the_fault_shows_in_its_regime(fault, op, change, regime, dtypes):
    for dtype in dtypes:
        mutant = partial(_call, BY_HAND[op], change)
        check = _judge(op, regime, dtype, mutant, width=192, hidden=384)
        assert not check.ok, f"{fault}: {check}, {check.excess:.2f} of its limit"


def test_a_gradient_that_is_exactly_zero_is_judged_by_what_cancelled_in_it():
    q, k, v, grad = torch.randn(4, 2, 1, 3, 32)
    q.requires_grad_()
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * 32**-0.5).softmax(-1)
    # As kernels form it: ds = p (dp - delta), where the two are equal but for rounding.
    dp = torch.einsum("bnhd,bmhd->bhnm", grad, v)
    delta = (grad.double() * v).sum(-1).float().transpose(1, 2).unsqueeze(-1)
    dq = torch.einsum("bhnm,bmhd->bnhd", weights * (dp - delta), k).detach() * 32**-0.5
    scale = (grad.double() * v).abs().sum(-1, keepdim=True) * k.double().abs() * 32**-0.5
    assert dq.any()
    assert judge("dq", dq, torch.zeros_like(scale), kind="dq", floor_only=True, scale=scale).ok
    assert not judge("dq", dq, torch.zeros_like(scale), kind="dq", floor_only=True).ok


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_rounded_repeatable_and_of_the_sizes_asked(op, dtype):
    for regime in regimes_of(op, dtype):
        inputs = REGIMES[regime].inputs(op, dtype, seed=1, tokens=17, width=48, head_dim=40)
        again = REGIMES[regime].inputs(op, dtype, seed=1, tokens=17, width=48, head_dim=40)
        other = REGIMES[regime].inputs(op, dtype, seed=2, tokens=17, width=48, head_dim=40)
        assert all(t.dtype in (dtype, torch.bool) for t in inputs.values())
        assert all(t.equal(again[name]) for name, t in inputs.items())
        assert not all(t.equal(other[name]) for name, t in inputs.items())
        assert all(t.double().equal(inputs[name].double()) for name, t in float64(inputs).items())


@pytest.mark.parametrize("tokens", TOKENS)
def test_images_have_as_many_patches_as_tokens_less_the_prefix(tokens):
    inputs = REGIMES["randn"].inputs("patch_embed", FP32, tokens=tokens)
    patches = F.conv2d(inputs["images"], inputs["weight"], stride=4).flatten(2).shape[2]
    assert patches + inputs.get("prefix", torch.empty(1, 0, 1)).shape[1] == tokens
    assert inputs["pos_embed"].shape[1] == tokens


def test_q_k_and_v_are_views_of_one_packed_projection():
    inputs = REGIMES["randn"].inputs("attention", FP16, tokens=5)
    q, k, v = (inputs[name] for name in "qkv")
    assert q.shape == (2, 5, 2, 32)
    assert q.stride() == k.stride() == (5 * 3 * 64, 3 * 64, 32, 1)
    assert [t.storage_offset() for t in (q, k, v)] == [0, 64, 128]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_logit_is_negative_where_that_is_the_regime(head_dim):
    inputs = float64(REGIMES["logits_negative"].inputs("attention", BF16, tokens=577, head_dim=head_dim))
    assert (torch.einsum("bnhd,bmhd->bhnm", inputs["q"], inputs["k"]) < 0).all()


def test_one_query_attends_to_nothing_and_the_others_to_themselves():
    for regime in ("masked", "masked_bool"):
        mask = REGIMES[regime].inputs("attention", FP16, tokens=17)["attn_mask"]
        attended = mask if mask.dtype == torch.bool else mask.isfinite()
        assert (attended.any(-1).sum(-1) == 16).all()
        assert (attended.diagonal(dim1=-2, dim2=-1).sum(-1) == 16).all()


def test_a_regime_refuses_what_it_does_not_concern():
    with pytest.raises(ValueError, match="layer_norm_linear"):
        REGIMES["logits_negative"].inputs("layer_norm_linear", FP32)
    with pytest.raises(ValueError, match="float16"):
        REGIMES["logits_100"].inputs("attention", FP32)


def _meetings(cells):
    return {pair for cell in cells for pair in combinations(cell.items(), 2)}


def test_pairwise_lets_every_two_values_meet_in_few_cells():
    axes = {"tokens": TOKENS, "head_dim": HEAD_DIMS, "regime": tuple(REGIMES), "dtype": DTYPES}
    cells = pairwise(**axes)
    assert cells == pairwise(**axes)
    assert len(_meetings(cells)) == sum(len(a) * len(b) for a, b in combinations(axes.values(), 2))
    assert len(cells) < 1.25 * len(TOKENS) * len(REGIMES)


def test_pairwise_leaves_out_only_what_is_not_allowed():
    cells = pairwise(lambda cell: cell["a"] != cell["b"], a=(1, 2, 3), b=(1, 2, 3), c="xy")
    assert all(cell["a"] != cell["b"] for cell in cells)
    assert len(_meetings(cells)) == 6 + 6 + 6


def test_pairwise_of_one_axis_is_every_value():
    assert pairwise(a="xyz") == [{"a": "x"}, {"a": "y"}, {"a": "z"}]
