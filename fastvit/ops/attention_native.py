"""attention in the CPU library, forward: the registered op, and its shapes for compilers.

    fastvit::attention_cpp_fwd(q, k, v, mask, causal, scale) -> out [B, N, H, d]

q, k and v are views [B, H, N, d] with any strides, after norms and rotations, which are torch's own. It is
for inference, where nothing records gradients; a program that was exported with it and is trained runs
torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call_facts import needs_gradient
from . import native, registration


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """In the place of torch's scaled_dot_product_attention, on float32 and without dropout: [B, H, N, d]."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            hidden = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = hidden.masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return registration.call(_fwd, q, k, v, attn_mask, is_causal, scale).transpose(1, 2)


def _fwd_kernels(q, k, v, mask, causal, scale):
    return native.ops.attention_fwd(q, k, v, mask, causal, scale)


def _fwd_autograd(q, k, v, mask, causal, scale):
    if needs_gradient(q, k, v, mask):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return out.transpose(1, 2).contiguous()
    return registration.below_autograd(_fwd, q, k, v, mask, causal, scale)


def _fwd_shapes(q, k, v, mask, causal, scale):
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads, head_dim)


_fwd = registration.register(
    "attention_cpp_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
)
