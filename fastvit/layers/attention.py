"""Multi-head self-attention with timm's arguments and parameter names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .norm import norm_arguments
from .plain import DROPOUTS, Unfused, is_identity, is_plain, known


@known
class Attention(nn.Module):
    """QKV projection, attention, output projection; q/k norm and a norm before the projection as options."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if attn_head_dim is None:
            if dim % num_heads:
                raise ValueError(f"num_heads={num_heads} does not divide the width {dim}")
            attn_head_dim = dim // num_heads
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim
        self.attn_dim = num_heads * attn_head_dim
        self.scale = attn_head_dim**-0.5
        self.fused_attn = True  # False: the attention weights pass through attn_drop, where hooks see them
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(attn_head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(attn_head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] to [B, N, D]; attn_mask as torch's scaled_dot_product_attention takes it."""
        x = attend(self, self.qkv(x), attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(x))


# Classes whose forward is a qkv projection, `attend`, and an output projection.
ATTENTIONS: dict[type[nn.Module], None] = {Attention: None}


def attend(
    attn: nn.Module, qkv: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, **rotary
) -> Tensor:
    """What lies between an attention module's projections: packed [B, N, 3 * H * d] to [B, N, H * d].

    Args:
        attn: has num_heads, head_dim, scale, fused_attn, q_norm, k_norm, attn_drop and norm, as timm's have.
        qkv: the projected tokens.
        attn_mask, is_causal: as torch's scaled_dot_product_attention takes them.
        rotary: `ops.attention`'s arguments for rotary positions.

    Raises:
        Unfused: for rotary positions, where only the module's own forward will do.
    """
    parts = attn._modules
    norm, attn_drop = parts["norm"], parts["attn_drop"]
    fused = attn.fused_attn and is_plain(attn_drop, DROPOUTS)
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": attn.scale}
    options["dropout_p"] = attn_drop.p if attn.training and fused else 0.0
    try:
        qk_norm = qk_norm_arguments(attn)
    except Unfused:
        qk_norm = None
    if fused and qk_norm is not None:
        foreign = attn_mask is not None or rotary  # the arguments that are not this module's own
        x = ops.attention(qkv, attn.num_heads, **options, **qk_norm, **rotary, validate=bool(foreign))
        return x if is_identity(norm) else norm(x)
    if rotary:
        raise Unfused("its norms of q and k, or its attention weights, are wanted beside rotary positions")
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = parts["q_norm"](q), parts["k_norm"](k)
    if fused:
        x = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        x = attn_drop(attention_weights(q * attn.scale, k, attn_mask, is_causal)) @ v
    return norm(x.transpose(1, 2).flatten(2))


def attention_weights(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T + mask) [B, H, N, N] of scaled q, and k, [B, H, N, d]."""
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    logits = q @ k.transpose(-2, -1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)


def qk_norm_arguments(attn: nn.Module) -> dict:
    """The attention op's arguments for the module's norms of q and k.

    Raises:
        Unfused: if only their own forwards know.
    """
    if is_identity(attn._modules["q_norm"]) and is_identity(attn._modules["k_norm"]):
        return {}
    q, k = norm_arguments(attn, "q_norm"), norm_arguments(attn, "k_norm")
    if (q.norm, q.eps) != (k.norm, k.eps):
        raise Unfused("q_norm and k_norm are of different kinds")
    return {
        "qk_norm": q.norm,
        "qk_norm_eps": q.eps,
        "q_norm_weight": q.weight,
        "q_norm_bias": q.bias,
        "k_norm_weight": k.weight,
        "k_norm_bias": k.bias,
    }
