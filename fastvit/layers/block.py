"""The pre-norm transformer block, with timm's arguments and parameter names, on the four fused ops."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from . import direct
from .attention import ATTENTIONS, Attention, between_projections
from .halves import AttentionHalf, Branch, MlpHalf, run_attention, run_mlp
from .mlp import MLPS, Mlp
from .norm import LayerNorm, norm_arguments
from .plain import (
    LINEARS,
    Unfused,
    idle_child,
    plain_child,
    raise_if_unfused,
    ran_its_own_forward,
    weight_and_bias,
)
from .regularization import DROP_PATHS, DropPath, LayerScale, layer_scale
from .settings import Settings

ATTN_LAYERS = {"": Attention, "attn": Attention}


class Block(nn.Module):
    """x + attention half, then x + MLP half.

    Each half runs as fused ops on its modules' parameters. Where a module inside carries a hook, was
    replaced or drops activations, that half runs module by module, as it is written in the paper
    (arXiv 2010.11929): the same numbers, and everything inside is called.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: str | Callable[..., nn.Module] = Attention,
        depth: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if isinstance(attn_layer, str):
            if attn_layer not in ATTN_LAYERS:
                raise ValueError(f"unknown attn_layer {attn_layer!r}; pass 'attn' or a class")
            attn_layer = ATTN_LAYERS[attn_layer]
        self.norm1 = norm_layer(dim, **dd)
        takes_depth = "depth" in inspect.signature(attn_layer).parameters
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **({"depth": depth} if takes_depth else {}),
            **dd,
        )
        self.ls1 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **dd,
        )
        self.ls2 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] to [B, N, D]; attn_mask as torch's scaled_dot_product_attention takes it."""
        settings = Settings.of(self)
        try:
            raise_if_unfused()
            attention, mlp = attention_half(self, settings.frozen), mlp_half(self, settings.frozen)
        except Unfused:  # one half may run fused all the same
            return self._mlp_half(self._attention_half(x, attn_mask, is_causal))
        options = {"attn_mask": attn_mask, "is_causal": is_causal}
        with settings.context():
            return direct.run(x, attention, mlp, options, settings)

    def _attention_half(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        settings = Settings.of(self)
        try:
            raise_if_unfused()
            half = attention_half(self, settings.frozen)
        except Unfused as reason:
            ran_its_own_forward(reason)
            masks = {"attn_mask": attn_mask, "is_causal": is_causal}
            return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **masks)))
        with settings.context():
            return run_attention(x, half, settings, attn_mask=attn_mask, is_causal=is_causal)

    def _mlp_half(self, x: Tensor) -> Tensor:
        settings = Settings.of(self)
        try:
            raise_if_unfused()
            half = mlp_half(self, settings.frozen)
        except Unfused as reason:
            ran_its_own_forward(reason)
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        with settings.context():
            return run_mlp(x, half, settings)


def attention_half(block: nn.Module, frozen: bool = False) -> AttentionHalf:
    """The half of a block whose parts are norm1, attn, ls1 and drop_path1, as timm names them.

    Raises:
        Unfused: if a part is to run its own forward.
    """
    attn = plain_child(block, "attn", ATTENTIONS)
    if attn._modules.get("gate") is not None:
        raise Unfused("attn has a gate on its output")
    qkv, proj = plain_child(attn, "qkv", LINEARS), plain_child(attn, "proj", LINEARS)
    idle_child(attn, "proj_drop")
    weight, bias = weight_and_bias(qkv)
    branch = Branch(layer_scale(block, "ls1"), plain_child(block, "drop_path1", DROP_PATHS), frozen)
    norm = norm_arguments(block, "norm1").beside(weight)
    return AttentionHalf(norm, weight, bias, between_projections(attn), *weight_and_bias(proj), branch)


def mlp_half(block: nn.Module, frozen: bool = False) -> MlpHalf:
    """The half of a block whose parts are norm2, mlp, ls2 and drop_path2.

    Raises:
        Unfused: if a part is to run its own forward.
    """
    mlp = plain_child(block, "mlp", MLPS)
    branch = Branch(layer_scale(block, "ls2"), plain_child(block, "drop_path2", DROP_PATHS), frozen)
    return MlpHalf(MLPS[type(mlp)](mlp, norm_arguments(block, "norm2")), branch)
