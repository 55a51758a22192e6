"""From tokens to one feature vector: class token, means, and attention pooling."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .mlp import MLPS, Mlp
from .norm import LayerNorm, norm_arguments
from .plain import Unfused, plain_child, raise_if_unfused, ran_its_own_forward
from .weight_init import trunc_normal_scaled_

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")


def global_pool_nlc(
    x: Tensor, pool_type: str = "token", num_prefix_tokens: int = 1, reduce_include_prefix: bool = False
) -> Tensor:
    """[B, N, D] to [B, D]: the class token, or the mean, maximum or both over the patch tokens.

    Raises:
        ValueError: for an unknown ``pool_type``.
    """
    if pool_type == "":
        return x
    if pool_type == "token":
        return x[:, 0]
    patches = x if reduce_include_prefix else x[:, num_prefix_tokens:]
    if pool_type == "avg":
        return patches.mean(dim=1)
    if pool_type == "max":
        return patches.amax(dim=1)
    if pool_type == "avgmax":
        return 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
    raise ValueError(f"unknown pool_type {pool_type!r}; it must be one of {', '.join(map(repr, POOLS))}")


class AttentionPoolLatent(nn.Module):
    """One learned query attends to every token, then an MLP: SigLIP's head (arXiv 2106.04560)."""

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if in_features % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {in_features}")
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, in_features, **dd))
        self.q = nn.Linear(in_features, in_features, **dd)
        self.kv = nn.Linear(in_features, 2 * in_features, **dd)
        self.proj = nn.Linear(in_features, in_features, **dd)
        self.norm = norm_layer(in_features, **dd)
        self.mlp = Mlp(in_features, int(in_features * mlp_ratio), act_layer=act_layer, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_scaled_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, D]."""
        heads = (self.num_heads, -1)
        q = self.q(self.latent.expand(x.shape[0], -1, -1)).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.proj(x)
        try:
            raise_if_unfused()
            mlp = plain_child(self, "mlp", MLPS)
            arguments = MLPS[type(mlp)](mlp, norm_arguments(self, "norm"))
        except Unfused as reason:
            ran_its_own_forward(reason)
            return (x + self.mlp(self.norm(x)))[:, 0]
        return ops.layer_norm_mlp(x, **arguments)[:, 0]


class AttentionPoolPrr(nn.Module):
    """Tokens refine each other by attention without parameters, then one or their mean is taken.

    Patch representation refinement, from "Locality-Attending Vision Transformer" (ICLR 2026).
    """

    def __init__(self, dim: int, num_heads: int = 8, pool_type: str = "token") -> None:
        super().__init__()
        if pool_type not in ("token", "avg"):
            raise ValueError(f"pool_type is {pool_type!r}; it must be 'token' or 'avg'")
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.pool = pool_type

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, D]."""
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return x[:, 0] if self.pool == "token" else x.mean(dim=1)
