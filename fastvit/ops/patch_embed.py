"""patch_embed: images to tokens, in one op."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backends
from ..asking import is_asking
from ..reference import patch_embed as reference
from . import checks, patch_embed_triton
from .overrides import overridden


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Project non-overlapping patches and write them, with positions, behind the prefix tokens.

    Args:
        images: [B, C, H, W], NCHW or channels_last; floating (weight's dtype), or uint8, divided by 255.
        weight: [D, C, ph, pw], Conv2d's layout.
        bias: [D] or None.
        pos_embed: [1, P + N, D] (the prefix tokens get positions too), [1, N, D] (patches only) or None.
        prefix: [1, P, D], the class and register tokens, or None.
        mean, std: [C] in 0..1 units, tensors or sequences, or None: images become (images - mean) / std.

    Returns:
        [B, P + N, D], contiguous, N = (H / ph) * (W / pw).

    Raises:
        ValueError: for a wrong rank, shape or device, or an image that is not a multiple of the patch.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: arXiv 2010.11929, section 3.1; register tokens arXiv 2309.16588.
    """
    tensors = (images, weight, bias, pos_embed, prefix)
    if overridden(tensors):
        return handle_torch_function(patch_embed, tensors, *tensors, mean=mean, std=std)
    _check(images, weight, bias, pos_embed, prefix)
    mean, std = (_per_channel(name, value, images, weight) for name, value in (("mean", mean), ("std", std)))
    if backends.resolve("patch_embed", *tensors, mean=mean, std=std) == "triton":
        return patch_embed_triton.patch_embed(*tensors, mean, std)
    if is_asking():
        num_prefix = 0 if prefix is None else prefix.shape[1]
        count = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
        return weight.new_empty((images.shape[0], num_prefix + count, weight.shape[0]))
    return reference(*tensors, mean=mean, std=std)


def _check(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, prefix: Tensor | None
) -> None:
    op = "patch_embed"
    checks.rank(op, "images", images, "B, C, H, W")
    checks.rank(op, "weight", weight, "D, C, ph, pw")
    channels, height, width = images.shape[1:]
    dim, in_channels, ph, pw = weight.shape
    if channels != in_channels:
        raise ValueError(f"{op}: images have {channels} channels; the weight takes {in_channels}")
    if not (height and width and ph and pw) or height % ph or width % pw:
        raise ValueError(
            f"{op}: images are {height}x{width}, not a multiple of the patch, {ph}x{pw}; resize, crop or pad"
        )
    checks.floating(op, "weight", weight)
    if images.dtype == torch.uint8:
        checks.device(op, "weight", weight, "images", images)
    else:
        checks.floating(op, "images (unless uint8)", images)
        checks.fit(op, "weight", weight, ("images", images, images.shape))
    num_prefix = 0
    if prefix is not None:
        checks.rank(op, "prefix", prefix, "1, P, D")
        num_prefix = prefix.shape[1]
    num_patches = (height // ph) * (width // pw)
    checks.fit(op, "weight", weight, ("bias", bias, (dim,)), ("prefix", prefix, (1, num_prefix, dim)))
    if pos_embed is None:
        return
    # Rows are compared as numbers: torch 2.11's compiler finds no symbolic shape in a tuple of shapes.
    rows = pos_embed.shape[1] if pos_embed.ndim == 3 else -1
    if rows != num_patches and rows != num_prefix + num_patches:
        raise ValueError(
            f"{op}: pos_embed must have shape {[1, num_patches, dim]} or "
            f"{[1, num_prefix + num_patches, dim]}, for {num_patches} patches and {num_prefix} prefix "
            f"tokens; it has {list(pos_embed.shape)}"
        )
    checks.fit(op, "weight", weight, ("pos_embed", pos_embed, (1, rows, dim)))


def _per_channel(
    name: str, value: Tensor | Sequence[float] | None, images: Tensor, weight: Tensor
) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        wide = torch.promote_types(weight.dtype, torch.float32)
        value = constant(tuple(value), wide, images.device)
    checks.device("patch_embed", "images", images, name, value)
    checks.fit("patch_embed", name, value, (name, value, (images.shape[1],)))
    return value


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is made once: a copy to a GPU waits for it, and cannot be captured in a graph."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return (_constant.__wrapped__ if traced else _constant)(values, dtype, device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
