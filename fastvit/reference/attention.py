"""Exact softmax attention (arXiv 1706.03762) on tokens that keep their heads side by side."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .normalization import normalize
from .rotary import rotate


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_layout: str = "half",
    num_prefix_tokens: int = 0,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v for every head; norm, then rotation, of q and k come first.

    Args:
        q: [B, N, H, d], any strides: a view of a packed projection is served without a copy.
        k, v: [B, M, H, d]; M = N in self-attention.
        scale: defaults to d ** -0.5.
        attn_mask: bool (True takes part) or additive floating, broadcastable to [B, H, N, M].
        key_mask: bool [B, M], True takes part.
        is_causal: token i sees tokens 0..i; not together with attn_mask.
        dropout_p: probability of dropping an attention weight.
        qk_norm: "layer_norm", "rms_norm" or None: q and k normalised over d (arXiv 2302.05442).
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [d] or None.
        qk_norm_eps: of both.
        rope_cos, rope_sin: broadcastable to [B, H, N - P, d], or None: rotary positions (arXiv 2104.09864).
        rope_layout: "half" or "interleaved".
        num_prefix_tokens: P, leading tokens that are not rotated.
        attend: what then stands in the place of torch's scaled_dot_product_attention, or None for that.

    Returns:
        [B, N, H * d], contiguous. A row whose every key is masked gives zeros, as torch's fused op does.
    """
    dtype = v.dtype
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if qk_norm is not None:
        q = normalize(q, q_norm_weight, q_norm_bias, qk_norm_eps, qk_norm)
        k = normalize(k, k_norm_weight, k_norm_bias, qk_norm_eps, qk_norm)
    if rope_cos is not None:
        q = rotate(q, rope_cos, rope_sin, rope_layout, num_prefix_tokens).to(dtype)
        k = rotate(k, rope_cos, rope_sin, rope_layout, num_prefix_tokens).to(dtype)
    if key_mask is not None:
        attn_mask, is_causal = _with_key_mask(attn_mask, key_mask, q.shape[2], is_causal), False
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        attn_mask = attn_mask.to(dtype)
    if attend is None:
        attend = _attend_by_definition if dtype == torch.float64 else F.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).flatten(2).contiguous()


def _with_key_mask(attn_mask: Tensor | None, key_mask: Tensor, num_queries: int, is_causal: bool) -> Tensor:
    keys = key_mask[:, None, None, :]
    if is_causal:
        return keys & torch.ones(num_queries, keys.shape[-1], dtype=torch.bool, device=keys.device).tril()
    if attn_mask is None:
        return keys
    if attn_mask.dtype == torch.bool:
        return attn_mask & keys
    return torch.where(keys, attn_mask, float("-inf"))


def _attend_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The oracle: the formula itself, not a library's tiling of it, and differentiable twice."""
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        weights = logits.softmax(dim=-1)
    else:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        logits = logits + attn_mask
        # softmax of a row of -inf is NaN, and so is its gradient: such rows are taken out before and after.
        dead = (logits == float("-inf")).all(dim=-1, keepdim=True)
        weights = logits.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)
    return F.dropout(weights, dropout_p) @ v
