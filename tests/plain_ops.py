"""The five ops stated a second time, in torch's own functionals: what fastvit's are held against.

In float64 this is the truth, and shares no line with `fastvit.reference`. In a lower dtype it is what torch's
fused ops make of the same numbers: the contract's baseline.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


def product_of_patches(images, weight, bias, *, stride):
    """The same convolution in torch's GEMM library instead of its convolution library."""
    patches = images.unfold(2, stride[0], stride[0]).unfold(3, stride[1], stride[1])
    tokens = F.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3), weight.flatten(1), bias)
    return tokens.permute(0, 3, 1, 2)


def patch_embed(
    images, weight, bias=None, pos_embed=None, prefix=None, *, mean=None, std=None, convolution=F.conv2d
):
    if images.dtype == torch.uint8 or mean is not None or std is not None:
        dtype = weight.dtype if images.dtype == torch.uint8 else images.dtype
        wide = torch.promote_types(dtype, torch.float32)
        unit = images.to(wide) / (255 if images.dtype == torch.uint8 else 1)
        mean = torch.as_tensor(0.0 if mean is None else mean, dtype=wide).reshape(-1, 1, 1)
        std = torch.as_tensor(1.0 if std is None else std, dtype=wide).reshape(-1, 1, 1)
        images = ((unit - mean) / std).to(dtype)
    tokens = convolution(images, weight, bias, stride=weight.shape[2:]).permute(0, 2, 3, 1).flatten(1, 2)
    if prefix is not None:
        tokens = torch.cat([prefix.repeat(len(images), 1, 1), tokens], dim=1)
    if pos_embed is None:
        return tokens
    without = tokens.shape[1] - pos_embed.shape[1]
    return tokens + F.pad(pos_embed, (0, 0, without, 0))


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-6, norm="layer_norm"):
    return F.linear(_norm(x, norm_weight, norm_bias, eps, norm), weight, bias)


def attention(
    qkv,
    num_heads,
    scale=None,
    *,
    attn_mask=None,
    key_mask=None,
    is_causal=False,
    dropout_p=0.0,
    qk_norm=None,
    q_norm_weight=None,
    q_norm_bias=None,
    k_norm_weight=None,
    k_norm_bias=None,
    qk_norm_eps=1e-6,
    rope_cos=None,
    rope_sin=None,
    rope_layout="half",
    num_prefix_tokens=0,
):
    batch, tokens, width = qkv.shape
    packed = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    if qk_norm is not None:
        q = _norm(q, q_norm_weight, q_norm_bias, qk_norm_eps, qk_norm)
        k = _norm(k, k_norm_weight, k_norm_bias, qk_norm_eps, qk_norm)
    if rope_cos is not None:
        tables = rope_cos, rope_sin, rope_layout, num_prefix_tokens
        q, k = _rotated(q, *tables).type_as(v), _rotated(k, *tables).type_as(v)
    if key_mask is not None:
        masks = [key_mask[:, None, None]] if attn_mask is None else [key_mask[:, None, None], attn_mask]
        if is_causal:
            masks.append(torch.ones(tokens, tokens, dtype=torch.bool).tril())
        attn_mask, is_causal = sum(_additive(mask, v.dtype) for mask in masks), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return out.permute(0, 2, 1, 3).reshape(batch, tokens, width // 3)


def linear_residual(x, weight, bias, residual, *, layer_scale=None, sample_scale=None):
    y = F.linear(x, weight, bias)
    y = y if layer_scale is None else y * layer_scale
    y = y if sample_scale is None else y * sample_scale[:, None, None]
    return residual + y


def layer_norm_mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    *,
    eps=1e-6,
    activation="gelu",
    norm="layer_norm",
    layer_scale=None,
    sample_scale=None,
    gate_weight=None,
    gate_bias=None,
    inner_norm_weight=None,
    inner_norm_bias=None,
):
    tokens = _norm(x, norm_weight, norm_bias, eps, norm)
    hidden = F.linear(tokens, fc1_weight, fc1_bias)
    if gate_weight is not None:
        hidden = F.silu(F.linear(tokens, gate_weight, gate_bias)) * hidden
    elif activation == "swiglu":
        half = hidden.shape[-1] // 2
        hidden = F.silu(hidden[..., :half]) * hidden[..., half:]
    else:
        hidden = ACTIVATIONS[activation](hidden)
    if inner_norm_weight is not None:
        hidden = _norm(hidden, inner_norm_weight, inner_norm_bias, eps, norm)
    scales = {"layer_scale": layer_scale, "sample_scale": sample_scale}
    return linear_residual(hidden, fc2_weight, fc2_bias, x, **scales)


def _norm(x, weight, bias, eps, norm):
    size = (x.shape[-1],)
    return (
        F.layer_norm(x, size, weight, bias, eps) if norm == "layer_norm" else F.rms_norm(x, size, weight, eps)
    )


def _additive(mask, dtype):
    return (
        mask
        if mask.is_floating_point()
        else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    )


def _rotated(x, cos, sin, layout, prefix):
    """Each pair (a, b) becomes (a cos - b sin, b cos + a sin), in the wider dtype of x and the tables."""
    half = x.shape[-1] // 2
    first = torch.arange(half) * (2 if layout == "interleaved" else 1)
    second = first + (1 if layout == "interleaved" else half)
    tokens = x[:, :, prefix:]
    a, b = tokens[..., first], tokens[..., second]
    turned = torch.cat(
        [a * cos[..., first] - b * sin[..., first], b * cos[..., second] + a * sin[..., second]], -1
    )
    back = torch.cat([first, second]).argsort()
    return torch.cat([x[:, :, :prefix], turned[..., back].to(x.dtype)], dim=2)
