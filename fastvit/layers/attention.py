"""Multi-head self-attention with timm's arguments and parameter names."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .norm import NORMS, norm_arguments
from .plain import DROPOUTS, Unfused, is_identity, is_plain, known, plain_child, ran_its_own_forward


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
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
        try:
            between = between_projections(self)
        except Unfused as reason:
            ran_its_own_forward(reason)
            x = self._by_modules(self.qkv(x), **masks)
        else:
            x = between(self.qkv(x), **masks)
        return self.proj_drop(self.proj(x))

    def _by_modules(self, qkv: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """What lies between the projections, with everything in it called."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn and is_plain(self.attn_drop, DROPOUTS):
            masks = {"attn_mask": attn_mask, "is_causal": is_causal}
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **masks)
        else:
            x = self.attn_drop(attention_weights(q * self.scale, k, attn_mask, is_causal)) @ v
        return self.norm(x.transpose(1, 2).flatten(2))


# Classes whose forward is a qkv projection, what `between_projections` says, and an output projection.
ATTENTIONS: dict[type[nn.Module], None] = {Attention: None}


class BetweenProjections(NamedTuple):
    """What an attention module computes between its projections, decided before anything runs.

    ``scale``: None for d ** -0.5. ``qk_norm``: `ops.attention`'s arguments for norms of q and k, or None.
    ``norm``: what follows the heads, a plain norm; calling it calls nothing else.
    """

    num_heads: int
    scale: float | None = None
    dropout_p: float = 0.0
    qk_norm: dict | None = None
    norm: nn.Module | None = None

    def __call__(self, qkv: Tensor, **options) -> Tensor:
        """Packed [B, N, 3 * H * d] to [B, N, H * d].

        ``options`` are a call's own: masks and rotary positions, as `ops.attention` takes them.
        """
        foreign = any(isinstance(option, Tensor) for option in options.values())
        norms = self.qk_norm or {}
        x = ops.attention(
            qkv, self.num_heads, self.scale, dropout_p=self.dropout_p, **norms, **options, validate=foreign
        )
        return x if self.norm is None else self.norm(x)


def between_projections(attn: nn.Module) -> BetweenProjections:
    """That of a module with num_heads, fused_attn, q_norm, k_norm, attn_drop and norm, as timm's have.

    Its ``scale`` is of no account: timm's fused attention does not read it.

    Raises:
        Unfused: if something in it is to be called, or its attention weights are to be seen.
    """
    if not attn.fused_attn:
        raise Unfused("attn is set to show its attention weights")
    attn_drop = plain_child(attn, "attn_drop", DROPOUTS)
    dropout_p = attn_drop.p if attn.training else 0.0
    norm = None if is_identity(attn._modules["norm"]) else plain_child(attn, "norm", NORMS)
    return BetweenProjections(attn.num_heads, None, dropout_p, qk_norm_arguments(attn), norm)


def attention_weights(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T + mask) [B, H, N, N] of scaled q, and k, [B, H, N, d]."""
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    logits = q @ k.transpose(-2, -1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)


def qk_norm_arguments(attn: nn.Module) -> dict | None:
    """The attention op's arguments for the module's norms of q and k; None if it has none.

    Raises:
        Unfused: if only their own forwards know.
    """
    if is_identity(attn._modules["q_norm"]) and is_identity(attn._modules["k_norm"]):
        return None
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
