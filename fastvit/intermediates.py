"""Intermediate features of a ViT, under timm's names: for dense prediction, probing and distillation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

OUTPUT_FORMATS = ("NCHW", "NLC")
Indices = int | Sequence[int] | None


class Intermediates:
    """The part of VisionTransformer that hands out what its blocks yield."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list | tuple[Tensor, list] | dict[str, Any]:
        """Final features and the outputs of chosen blocks.

        Args:
            x: images [B, C, H, W].
            indices: all blocks for None, the last n for an int, or block numbers (negative from the end).
            return_prefix_tokens: pair each output with its prefix tokens.
            norm: apply the final norm to each output.
            stop_early: do not run blocks behind the last one taken.
            output_fmt: "NCHW" ([B, D, H, W] feature maps) or "NLC" ([B, N, D]).
            intermediates_only: return the outputs alone.
            output_dict: return a dict: image_intermediates, image_intermediates_prefix, image_features.
            attn_mask, is_causal: as in ``forward``.

        Raises:
            ValueError: for a block that the model does not have, or an unknown ``output_fmt``.
        """
        if output_fmt not in OUTPUT_FORMATS:
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be one of {', '.join(OUTPUT_FORMATS)}")
        taken = take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = self._embed(x)
        outputs = []
        for i, block in enumerate(self.blocks[: max(taken) + 1] if stop_early else self.blocks):
            x = self._run(block, x, attn_mask, is_causal)
            if i in taken:
                outputs.append(self.norm(x) if norm else x)

        prefixes = [y[:, : self.num_prefix_tokens] for y in outputs] if self.num_prefix_tokens else None
        outputs = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            if self.training and getattr(self.patch_drop, "prob", 0.0):
                raise ValueError("patch dropout leaves no feature map in training: ask for output_fmt='NLC'")
            outputs = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in outputs]
        with_prefixes = return_prefix_tokens and prefixes is not None
        if output_dict:
            result = {"image_intermediates": outputs}
            if with_prefixes:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        if with_prefixes:
            outputs = list(zip(outputs, prefixes, strict=True))
        return outputs if intermediates_only else (self.norm(x), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: Indices = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list:
        """DINO's interface to the same: the last n blocks, or the named ones."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one taken, and norm and head if asked; returns those taken."""
        taken = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken


def take_indices(depth: int, indices: Indices) -> list[int]:
    """Absolute block numbers for what ``forward_intermediates`` takes.

    Raises:
        ValueError: for a block, or a count of blocks, that the depth does not have.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"the last {indices} blocks were asked for; the model has {depth}")
        return list(range(depth - indices, depth))
    indices = list(indices)
    taken = [depth + index if index < 0 else index for index in indices]
    for given, index in zip(indices, taken, strict=True):
        if not 0 <= index < depth:
            raise ValueError(f"block {given} was asked for; the model has blocks 0 to {depth - 1}")
    return taken
