"""What training scripts ask of a ViT and change in it, under timm's names."""

from typing import Any

import torch
from torch import nn

from .layers.pool import POOLS

Size = int | tuple[int, int]


class Adjustable:
    """The part of VisionTransformer that changes a model after it was built."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations (arXiv 1604.06174)."""
        self.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and another pooling if asked.

        Raises:
            ValueError: for an unknown pooling, or attention pooling where the model has none.
        """
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(
                    f"global_pool is {global_pool!r}; it must be one of {', '.join(map(repr, POOLS))}"
                )
            if global_pool == "token" and not self.has_class_token:
                raise ValueError("global_pool='token' needs the class token, which this model does not have")
            if global_pool not in ("map", "prr"):
                self.attn_pool = None
            elif self.attn_pool is None or self.global_pool != global_pool:
                raise ValueError(
                    f"attention pooling {global_pool!r} can't be added later; construct the model with it"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes > 0:
            like = next(self.parameters())
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            self.head.train(self.training)
        else:
            self.head = nn.Identity()

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Another image size (positions resized by ``pos_resize``) or patch size (FlexiViT's resampling)."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            with torch.no_grad():
                resized = self._resized_positions(self.patch_embed.grid_size, old_grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
