"""How timm's models make tokens of images, in one op: patches, prefix tokens and positions.

timm calls ``patch_embed``, then ``_pos_embed``, in several methods. So that all of them are served as they
are written, the finished tokens travel through both calls in an `Embedded`, which no one else ever sees.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timm import layers
from torch import Tensor, nn

from .. import ops, recording
from ..asking import is_asking
from ..call_facts import compute_dtype
from ..layers.patch_embed import cuts_patches, joined_tokens
from ..layers.plain import (
    CONVOLUTIONS,
    Unfused,
    idle_child,
    known,
    plain_child,
    raise_if_unfused,
    ran_its_own_forward,
    weight_and_bias,
)
from ..layers.settings import Settings
from .idle import ask, is_served
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
        return x if isinstance(x, Embedded) else layers.PatchEmbed.forward(self, x)


def on_embedded(forward: Callable, model: nn.Module, images: Tensor, *args, **kwargs) -> Any:
    """timm's ``forward`` of the model, on what `embedded` makes of the images."""
    kind = type(model)
    try:
        return forward(model, embedded(model, images), *args, **kwargs)
    except (AttributeError, TypeError):
        if type(model) is kind:
            raise
    return forward(model, images, *args, **kwargs)  # another thread has restored it meanwhile


def embedded(model: nn.Module, images: Tensor) -> Tensor | Embedded:
    """The images as they are to go through the model: embedded already, or as they are."""
    settings = Settings.of(model)
    served = is_served(model, images) if settings.mean is None else True
    if served is False:
        return images
    with recording.inside("patch_embed"), settings.context():
        try:
            if served is None and not ask(model, images, partial(_tokens, model, images, settings)):
                return images
            tokens, grid = _tokens(model, images, settings)
        except Unfused as reason:
            ran_its_own_forward(reason)
            return settings.normalized(images, model.patch_embed)
    return Embedded(tokens, images.shape, grid)


def _tokens(model: nn.Module, images: Tensor, settings: Settings) -> tuple[Tensor, tuple[int, int]]:
    arguments, grid = gather(model, images, settings)
    return ops.patch_embed(*arguments, mean=settings.mean, std=settings.std), grid


def gather(model: nn.Module, images: Tensor, settings: Settings) -> tuple[tuple, tuple[int, int]]:
    """`patch_embed`'s arguments, and the grid of patches.

    Raises:
        Unfused: if timm's own code is to do it; wrong sizes too, which it says in its way.
    """
    raise_if_unfused()
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
    if prefix is None:  # the tokens lie as the convolution leaves them, in which order dropout draws
        idle_child(model, "pos_drop")
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
    if is_asking():
        return model.pos_embed.new_empty((1, num_prefix + grid[0] * grid[1], model.pos_embed.shape[2]))
    return layers.resample_abs_pos_embed(
        model.pos_embed, new_size=grid, old_size=model.patch_embed.grid_size, num_prefix_tokens=num_prefix
    )
