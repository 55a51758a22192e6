"""Images to the tokens of the first block: patches, prefix tokens, positions."""

import torch
from torch import Tensor

from . import ops, recording
from .layers.patch_embed import PatchEmbed, joined_tokens
from .layers.plain import is_identity, ran_its_own_forward, weight_and_bias, why_unfused
from .layers.pos_embed import resize_pos_embed
from .layers.settings import Settings

# It asks for sizes, which torch.fx does not know while it traces: a leaf in its graphs.
torch.fx.wrap("resize_pos_embed")


class Embedding:
    """The part of VisionTransformer in front of its blocks."""

    normalizes = True  # fold_normalize may ask it to

    def _embed(self, images: Tensor) -> Tensor:
        """Images to tokens with prefix and positions, up to the first block."""
        embed = self.patch_embed
        adds_positions = type(self)._pos_embed is Embedding._pos_embed and "_pos_embed" not in self.__dict__
        settings = Settings.of(self)
        # Without prefix the tokens lie as the convolution leaves them, in which order dropout draws.
        draws_alike = self.num_prefix_tokens or is_identity(self.pos_drop)
        if isinstance(embed, PatchEmbed) and embed.is_fusable() and adds_positions and draws_alike:
            images = embed.fit(images, crop=True)
            positions = self._positions(embed.dynamic_feat_size(images.shape[-2:]))
            parts = (*weight_and_bias(embed.proj), positions, self._prefix())
            with recording.inside("patch_embed"), settings.context():
                x = ops.patch_embed(images, *parts, mean=settings.mean, std=settings.std)
            x = x if positions is None else self.pos_drop(x)
        else:
            not_plain = (
                "its patch embedding, or something in it, is not plain, or drops tokens without a prefix"
            )
            ran_its_own_forward(why_unfused() or not_plain)
            x = self._pos_embed(embed(settings.normalized(images, embed)))
        return self.norm_pre(self.patch_drop(x))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Prefix and positions for an embedding layer of another kind: [B, H, W, D] or [B, N, D] tokens."""
        positions = self._positions(x.shape[1:-1])
        x = x.flatten(1, -2)
        if positions is not None and self.no_embed_class:
            x = x + positions
        if self.num_prefix_tokens:
            x = torch.cat([self._prefix().expand(x.shape[0], -1, -1), x], dim=1)
        if positions is None:
            return x
        return self.pos_drop(x if self.no_embed_class else x + positions)

    def _prefix(self) -> Tensor | None:
        return joined_tokens(self.cls_token, self.reg_token)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embed is None:
            return None
        if self.dynamic_img_size:
            return self._resized_positions(grid, self.patch_embed.grid_size)
        # The op would take both forms, with rows for the prefix and without: only one is this model's.
        rows = self.patch_embed.num_patches + (0 if self.no_embed_class else self.num_prefix_tokens)
        given = self._parameters.get("pos_embed")
        if given is not None and given.shape[1] != rows:
            raise ValueError(f"pos_embed has {given.shape[1]} rows; this model has {rows} positions")
        return self.pos_embed

    def _resized_positions(self, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resize_pos_embed(self.pos_embed, grid, old_grid, num_prefix, self.pos_resize)
