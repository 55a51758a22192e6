"""Random arguments for each public op, by its sizes and options. ``randn`` decides dtype and numbers."""

from math import prod

import torch


def _patch_embed(
    randn,
    *,
    batch=2,
    grid=(2, 3),
    patch=(4, 4),
    channels=3,
    width=8,
    bias=True,
    positions="all",
    prefix=1,
    normalized=None,
    images="float",
):
    size = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    mean, std = 0.5 + randn(channels, wide=True) / 8, 0.25 + randn(channels, wide=True).abs() / 8
    if normalized == "sequences":
        mean, std = mean.tolist(), std.tolist()
    pixels = randn(*size)
    return {
        "images": pixels if images == "float" else (128 + 60 * pixels.float()).clamp(0, 255).to(torch.uint8),
        "weight": randn(width, channels, *patch) / (channels * prod(patch)) ** 0.5,
        "bias": randn(width) if bias else None,
        "pos_embed": randn(1, prod(grid) + prefix * (positions == "all"), width) if positions else None,
        "prefix": randn(1, prefix, width) if prefix else None,
        "mean": mean if normalized not in (None, "std") else None,
        "std": std if normalized not in (None, "mean") else None,
    }


def _layer_norm_linear(
    randn,
    *,
    batch=2,
    tokens=5,
    width=8,
    out=12,
    norm="layer_norm",
    affine="weight and bias",
    bias=True,
    eps=None,
):
    return {
        "x": randn(batch, tokens, width),
        **_norm(randn, "norm", width, affine),
        "weight": randn(out, width) / width**0.5,
        "bias": randn(out) if bias else None,
        "norm": norm,
        "eps": eps,
    }


def _attention(
    randn,
    *,
    batch=2,
    tokens=7,
    heads=2,
    head_dim=8,
    scale=None,
    mask=None,
    key_mask=False,
    norm=None,
    affine="weight and bias",
    rope=None,
    prefix=0,
):
    attended = randn(1, 1, tokens, tokens) > -0.5
    attended[..., tokens // 2, :] = False
    keys = randn(batch, tokens) > -1
    tables = {}
    if rope is not None:
        # A table's own halves need not agree: mixed axes (EVA-02, DINOv3) give each channel its own angle.
        a_head = [heads] if "a head" in rope else []
        angles = randn(*a_head, tokens - prefix, head_dim, wide=True)
        tables = {"rope_cos": angles.cos(), "rope_sin": angles.sin(), "rope_layout": rope.partition(",")[0]}
    norms = {"qk_norm": norm} if norm else {}
    for part in "qk" if norm else "":
        norms |= _norm(randn, f"{part}_norm", head_dim, affine)
    return {
        "qkv": randn(batch, tokens, 3 * heads * head_dim),
        "num_heads": heads,
        "scale": scale,
        "attn_mask": attended
        if mask == "bool"
        else randn(heads, tokens, tokens)
        if mask == "float"
        else None,
        "key_mask": keys if key_mask else None,
        "is_causal": mask == "causal",
        "num_prefix_tokens": prefix,
        **norms,
        **tables,
    }


def _linear_residual(
    randn, *, batch=2, tokens=5, width=8, inner=12, bias=True, layer_scale=True, sample_scale=True
):
    return {
        "x": randn(batch, tokens, inner),
        "weight": randn(width, inner) / inner**0.5,
        "bias": randn(width) if bias else None,
        "residual": randn(batch, tokens, width),
        "layer_scale": randn(width) if layer_scale else None,
        "sample_scale": randn(batch) if sample_scale else None,
    }


def _layer_norm_mlp(
    randn,
    *,
    batch=2,
    tokens=5,
    width=8,
    hidden=12,
    norm="layer_norm",
    affine="weight and bias",
    activation="gelu",
    inner_norm=None,
    biases=True,
    layer_scale=True,
    sample_scale=True,
    eps=None,
):
    own_gate = activation == "swiglu, own gate"
    rows = 2 * hidden if activation == "swiglu" else hidden
    return {
        "x": randn(batch, tokens, width),
        **_norm(randn, "norm", width, affine),
        "fc1_weight": randn(rows, width) / width**0.5,
        "fc1_bias": randn(rows) if biases else None,
        "fc2_weight": randn(width, hidden) / hidden**0.5,
        "fc2_bias": randn(width) if biases else None,
        "gate_weight": randn(hidden, width) / width**0.5 if own_gate else None,
        "gate_bias": randn(hidden) if own_gate and biases else None,
        **_norm(randn, "inner_norm", hidden, inner_norm),
        "layer_scale": randn(width) if layer_scale else None,
        "sample_scale": randn(batch) if sample_scale else None,
        "activation": activation.partition(",")[0],
        "norm": norm,
        "eps": eps,
    }


def _norm(randn, prefix, width, affine):
    return {
        f"{prefix}_weight": 1 + randn(width) / 4 if affine else None,
        f"{prefix}_bias": randn(width) if affine == "weight and bias" else None,
    }


BUILDERS = {
    "patch_embed": _patch_embed,
    "layer_norm_linear": _layer_norm_linear,
    "attention": _attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
}
