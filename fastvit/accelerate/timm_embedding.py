"""How timm's models make tokens of images, in one op: patches, prefix tokens and positions.

timm calls ``patch_embed``, then ``_pos_embed``, in several methods. So that all of them are served as they
are written, the finished tokens travel through both calls in an `Embedded`, which no one else ever sees.
"""

from typing import NamedTuple

import torch
from timm import layers
from torch import Tensor, nn

from .. import backends, ops, recording
from ..call_facts import compute_dtype
from ..layers.patch_embed import cuts_patches, joined_tokens
from ..layers.plain import (
    CONVOLUTIONS,
    Unfused,
    idle_child,
    known,
    plain_child,
    ran_its_own_forward,
    weight_and_bias,
)
from ..layers.settings import Settings
from .idle import became_idle, is_idle
from .registry import PARTS, Replacement, outlives_restore, replaces


class Embedded(NamedTuple):
    """Tokens [B, P + N, D] with prefix and positions, the shape of the images, and their grid of patches."""

    tokens: Tensor
    shape: torch.Size
    grid: tuple[int, int]


@known
@replaces(layers.PatchEmbed, PARTS)
class PatchEmbed(Replacement, layers.PatchEmbed):
    @outlives_restore
    def forward(self, x: Tensor | Embedded) -> Tensor | Embedded:
        return x if isinstance(x, Embedded) else super().forward(x)


def embedded(model: nn.Module, images: Tensor) -> Tensor | Embedded:
    """The images as they are to go through the model: embedded already, or as they are."""
    if is_idle(model, images):
        return images
    settings, served = Settings.of(model), backends.served()
    with recording.inside("patch_embed"), settings.context():
        try:
            arguments, grid = gather(model, images, settings)
        except Unfused as reason:
            ran_its_own_forward(reason)
            return settings.normalized(images, model.patch_embed)
        tokens = ops.patch_embed(*arguments, mean=settings.mean, std=settings.std)
    if settings.mean is None and became_idle(model, images, backends.served() > served):
        return images
    return Embedded(tokens, images.shape, grid)


def gather(model: nn.Module, images: Tensor, settings: Settings) -> tuple[tuple, tuple[int, int]]:
    """`patch_embed`'s arguments, and the grid of patches.

    Raises:
        Unfused: if timm's own code is to do it; wrong sizes too, which it says in its way.
    """
    embed = plain_child(model, "patch_embed", (PatchEmbed,))
    proj = plain_child(embed, "proj", CONVOLUTIONS)
    idle_child(embed, "norm")
    weight, bias = weight_and_bias(proj)
    if not cuts_patches(proj):
        raise Unfused("its convolution does more than to cut patches")
    if not isinstance(images, Tensor):
        raise Unfused(f"it is called with a {type(images).__name__}")
    dtypes = (weight.dtype,) if settings.mean is None else (weight.dtype, torch.uint8)
    if images.ndim != 4 or images.shape[1] != weight.shape[1] or images.dtype not in dtypes:
        raise Unfused("the images do not fit the projection's channels or dtype")
    (height, width), (ph, pw), size = images.shape[2:], embed.patch_size, embed.img_size
    whole = not (height % ph or width % pw)
    if size is not None and embed.strict_img_size and (height, width) != tuple(size):
        raise Unfused("the images are not of the model's size")
    if not whole and (embed.dynamic_img_pad or (size is not None and not embed.strict_img_size)):
        raise Unfused("the images are not of whole patches")
    grid = (height // ph, width // pw)
    if not whole:  # a view: a convolution never reads what is left over
        images = images[:, :, : grid[0] * ph, : grid[1] * pw]
    prefix = joined_tokens(model.cls_token, model.reg_token)
    positions = _positions(model, grid)
    for tensor in (positions, prefix):
        if tensor is not None and tensor.dtype != weight.dtype and compute_dtype(weight) == weight.dtype:
            raise Unfused("its tokens and its projection have different dtypes")
    return (images, weight, bias, positions, prefix), grid


def _positions(model: nn.Module, grid: tuple[int, int]) -> Tensor | None:
    if model.pos_embed is None:
        return None
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if not model.dynamic_img_size:
        if model.pos_embed.shape[1] != num_prefix + grid[0] * grid[1]:
            raise Unfused("its positions are not those of its grid")
        return model.pos_embed
    return layers.resample_abs_pos_embed(
        model.pos_embed, new_size=grid, old_size=model.patch_embed.grid_size, num_prefix_tokens=num_prefix
    )
