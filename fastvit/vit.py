"""VisionTransformer: timm's constructor, state-dict keys and methods, on fastvit's ops."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adjust import Adjustable, Size
from .call_facts import transformed
from .embedding import Embedding
from .intermediates import Intermediates
from .layers.activation import get_act_layer
from .layers.attention import Attention
from .layers.block import Block
from .layers.mlp import Mlp
from .layers.norm import LayerNorm, get_norm_layer
from .layers.patch_embed import PatchEmbed
from .layers.pool import POOLS, AttentionPoolLatent, AttentionPoolPrr, global_pool_nlc
from .layers.pos_embed import POS_RESIZE
from .layers.regularization import PatchDropout
from .layers.weight_init import INIT_MODES, init_weights, trunc_normal_

Layer = str | Callable[..., nn.Module]


class VisionTransformer(Embedding, Intermediates, Adjustable, nn.Module):
    """Vision Transformer (arXiv 2010.11929).

    Args:
        img_size: input size in pixels, one side or (height, width).
        patch_size: patch size in pixels.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: "token", "avg", "avgmax", "max", "map" (attention pooling), "prr" or "" (all tokens).
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, hidden width / width.
        qkv_bias, proj_bias: biases of the QKV projection, and of the output projection and MLP.
        qk_norm: normalise q and k over the head's channels.
        scale_attn_norm, scale_mlp_norm: a norm before the output projection, and before fc2.
        init_values: LayerScale's first value; None for no LayerScale.
        class_token, reg_tokens: a class token, and how many register tokens (arXiv 2309.16588).
        pos_embed: "learn", or "none" (or "").
        no_embed_class: positions for the patches only, not for the prefix tokens.
        pre_norm: a norm before the blocks, and no bias in the patch projection (CLIP).
        final_norm: a norm after the blocks.
        fc_norm: the final norm after pooling instead; None: where pooling is "avg", "avgmax" or "max".
        pool_include_prefix: let pooling see the prefix tokens.
        dynamic_img_size, dynamic_img_pad: take any image size, resizing positions; pad to whole patches.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout of
            the head, after positions, of patch tokens, after projections, of attention, and of whole halves.
        weight_init: "", "jax", "jax_nlhb", "moco", "reset" or "skip".
        fix_init: divide the output projections by sqrt(2 * block number).
        embed_layer, embed_norm_layer, norm_layer, act_layer, block_fn, mlp_layer, attn_layer: classes, or
            names where timm takes names.
        device, dtype: of the parameters.
        pos_resize: whose way of resizing positions: "timm", "huggingface", "torchvision" or "open_clip".

    Raises:
        ValueError: for arguments that exclude each other or name nothing known.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        embed_norm_layer: Layer | None = None,
        norm_layer: Layer | None = None,
        act_layer: Layer | None = None,
        block_fn: Callable[..., nn.Module] = Block,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: Layer = Attention,
        device=None,
        dtype=None,
        pos_resize: str = "timm",
    ) -> None:
        super().__init__()
        _one_of("global_pool", global_pool, POOLS)
        _one_of("pos_embed", pos_embed, ("", "none", "learn"))
        _one_of("weight_init", weight_init, INIT_MODES)
        _one_of("pos_resize", pos_resize, POS_RESIZE)
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token' needs the class token; pool by 'avg' or 'map' without it")
        dd = {"device": device, "dtype": dtype}
        norm_layer = get_norm_layer(norm_layer) or LayerNorm
        act_layer = get_act_layer(act_layer) or nn.GELU
        norm_after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens = reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix or global_pool == "prr"
        self.dynamic_img_size = dynamic_img_size
        self.pos_resize = pos_resize
        self.grad_checkpointing = False

        embed_args: dict[str, Any] = {}
        if dynamic_img_size:
            embed_args |= {"strict_img_size": False, "output_fmt": "NHWC"}
        if embed_norm_layer:
            embed_args["norm_layer"] = get_norm_layer(embed_norm_layer)
        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **dd,
        )
        num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        num_positions = num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = (
            nn.Parameter(torch.empty(1, num_positions, embed_dim, **dd)) if pos_embed == "learn" else None
        )
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        self.patch_drop = (
            PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate > 0.0 else nn.Identity()
        )
        self.norm_pre = norm_layer(embed_dim, **dd) if pre_norm else nn.Identity()

        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[i],
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=i,
                    **dd,
                )
                for i in range(depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio() if hasattr(self.patch_embed, "feat_ratio") else patch_size
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **dd) if final_norm and not norm_after_pool else nn.Identity()
        self.attn_pool = None
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(embed_dim, num_heads, mlp_ratio, norm_layer, act_layer, **dd)
        elif global_pool == "prr":
            self.attn_pool = AttentionPoolPrr(embed_dim, num_heads, "token" if class_token else "avg")
        self.fc_norm = norm_layer(embed_dim, **dd) if final_norm and norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw every weight anew by ``mode``, or by the constructor's ``weight_init``."""
        mode = mode or self.weight_init_mode
        _one_of("weight_init", mode, INIT_MODES)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        init_weights(self, mode, head_bias, needs_reset)
        if self.fix_init:
            self.fix_init_weight()

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Divide the output projections by sqrt(2 * block number), as BEiT does (arXiv 2106.08254)."""
        for number, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, H, W] to logits [B, num_classes] (or features, without classifier)."""
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, H, W] to tokens [B, P + N, D] after the final norm."""
        x = self._embed(x)
        if attn_mask is not None or is_causal or self.grad_checkpointing:
            for block in self.blocks:
                x = self._run(block, x, attn_mask, is_causal)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, P + N, D] to logits, or to the pooled features before the classifier."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens to [B, D] by ``pool_type``, or by the model's own pooling."""
        if self.attn_pool is not None:
            return self.attn_pool(x if self.pool_include_prefix else x[:, self.num_prefix_tokens :])
        pool_type = self.global_pool if pool_type is None else pool_type
        return global_pool_nlc(x, pool_type, self.num_prefix_tokens, self.pool_include_prefix)

    def _run(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal)
        # torch.func has no checkpoints.
        if self.grad_checkpointing and torch.is_grad_enabled() and not transformed():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
