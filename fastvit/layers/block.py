"""The pre-norm transformer block, with timm's arguments and parameter names, on the four fused ops."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from .. import ops
from .attention import Attention
from .mlp import Mlp
from .norm import LayerNorm, norm_arguments
from .plain import is_identity, is_plain, weight_and_bias
from .regularization import DropPath, LayerScale

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
        return self._mlp_half(self._attention_half(x, attn_mask, is_causal))

    def _attention_half(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        parts = self._modules
        attn, layer_scale, drop_path = parts["attn"], parts["ls1"], parts["drop_path1"]
        norm = norm_arguments(parts["norm1"])
        if norm is None or not _is_scaling(layer_scale, drop_path) or not is_plain(attn, Attention):
            return self._attention_half_by_modules(x, attn_mask, is_causal)
        qkv, proj, proj_drop = (attn._modules[name] for name in ("qkv", "proj", "proj_drop"))
        if not (is_plain(qkv, nn.Linear) and is_plain(proj, nn.Linear) and is_identity(proj_drop)):
            return self._attention_half_by_modules(x, attn_mask, is_causal)
        weight, bias = weight_and_bias(qkv)
        if norm.weight is not None and norm.weight.dtype != weight.dtype:
            return self._attention_half_by_modules(x, attn_mask, is_causal)
        packed = ops.layer_norm_linear(
            x, norm.weight, norm.bias, weight, bias, eps=norm.eps, norm=norm.norm, validate=False
        )
        tokens = attn.attend(packed, attn_mask, is_causal)
        return ops.linear_residual(
            tokens, *weight_and_bias(proj), x, **_scales(layer_scale, drop_path, x), validate=False
        )

    def _mlp_half(self, x: Tensor) -> Tensor:
        parts = self._modules
        mlp, layer_scale, drop_path = parts["mlp"], parts["ls2"], parts["drop_path2"]
        norm = norm_arguments(parts["norm2"])
        arguments = None
        if norm is not None and hasattr(type(mlp), "op_arguments") and _is_scaling(layer_scale, drop_path):
            arguments = mlp.op_arguments(norm)
        if arguments is None:
            return self._mlp_half_by_modules(x)
        return ops.layer_norm_mlp(x, **arguments, **_scales(layer_scale, drop_path, x), validate=False)

    def _attention_half_by_modules(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return x + self.drop_path1(
            self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        )

    def _mlp_half_by_modules(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _is_scaling(layer_scale: nn.Module, drop_path: nn.Module) -> bool:
    return is_plain(layer_scale, LayerScale, nn.Identity) and is_plain(drop_path, DropPath, nn.Identity)


def _scales(layer_scale: nn.Module, drop_path: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    return {
        "layer_scale": layer_scale.gamma if type(layer_scale) is LayerScale else None,
        "sample_scale": drop_path.sample_scale(x) if type(drop_path) is DropPath else None,
    }
