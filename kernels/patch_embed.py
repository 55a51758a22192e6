"""patch_embed's launchers: images to tokens, and the gradients."""

import torch
from torch import Tensor

from . import patch_embed_plan as plan
from .launch import arch_of
from .launch_cache import run
from .patch_embed_aot import aot_launches
from .patch_embed_projection import Projection, colours, flatten_weight, fold, image_layout, project

__all__ = ["aot_launches", "fold", "image_layout", "patch_embed_bwd", "patch_embed_fwd", "project"]


def patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    precision: str = "ieee",
    projection: Projection | None = None,
) -> Tensor:
    """Tokens [B, P + N, D] in the weight's dtype, which is float32, float16 or bfloat16, in one launch.

    Args:
        images: [B, C, H, W] with any strides, in the weight's dtype or uint8.
        weight: [D, C, ph, pw], as the op has it: not folded.
        bias, pos_embed, prefix: as the op has them.
        mean, std: [C] tensors on the images' device, or None.
        precision: "ieee" or "tf32", for float32.
        projection: ``project``'s result for these images, weight, bias, mean and std, if the caller keeps it.
    """
    patch = weight.shape[2:]
    num_patches = images.shape[2] // patch[0] * (images.shape[3] // patch[1])
    num_prefix = 0 if prefix is None else prefix.shape[1]
    out = torch.empty(
        images.shape[0], num_prefix + num_patches, weight.shape[0], dtype=weight.dtype, device=weight.device
    )
    if out.numel():
        projection = projection or project(images, weight, bias, mean, std)
        run(plan.fwd, arch_of(out.device), images, patch, projection, pos_embed, prefix, out, precision)
    return out


def patch_embed_bwd(
    grad_out: Tensor,
    images: Tensor,
    weight: Tensor,
    *,
    num_prefix: int,
    pos_embed_rows: int,
    needs: tuple[bool, bool, bool, bool, bool],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor | None, ...]:
    """Gradients of images, weight, bias, pos_embed and prefix where ``needs`` says so, else None.

    The same numbers bit for bit on every run. ``images``, ``weight``, ``mean`` and ``std`` are the forward's.

    Args:
        grad_out: [B, P + N, D] in the weight's dtype, with any strides.
        num_prefix, pos_embed_rows: P, and the rows of pos_embed (0 without one).
    """
    arch, width = arch_of(weight.device), weight.shape[0]
    mean, std = colours(mean), colours(std)
    gradients: dict[str, Tensor] = {}
    if needs[0]:
        gradients["images"] = dimages = torch.empty_like(images)
        if dimages.numel():
            flat = flatten_weight(weight, image_layout(dimages))
            run(plan.dimages, arch, grad_out, flat, weight.shape[2:], std, dimages, num_prefix, precision)
    if needs[1]:
        gradients["weight"] = _dweight(arch, grad_out, images, weight, mean, std, num_prefix, precision)
    if any(needs[2:]):
        dpos = weight.new_empty(1, pos_embed_rows, width) if needs[3] else None
        dprefix = weight.new_empty(1, num_prefix, width) if needs[4] else None
        num_patches = grad_out.shape[1] - num_prefix
        sums = weight.new_empty(num_patches, width, dtype=torch.float32) if needs[2] else None
        run(plan.sum_images, grad_out, dpos, dprefix, sums, num_prefix)
        gradients |= {"pos_embed": dpos, "prefix": dprefix}
        if sums is not None:
            gradients["bias"] = dbias = weight.new_empty(width)
            run(plan.sum_rows, sums, dbias)
    names = ("images", "weight", "bias", "pos_embed", "prefix")
    return tuple(gradients.get(name) for name in names)


def _dweight(
    arch: str,
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    num_prefix: int,
    precision: str,
) -> Tensor:
    """[D, C, ph, pw], channels_last if the images are."""
    width, channels, *_ = weight.shape
    patch = weight.shape[2:]
    size = weight[0].numel()
    splits = plan.dweight_splits(arch, grad, size, num_prefix, precision)
    flat = weight.new_empty(width, size)
    # A single chunk is the sum already.
    partials = flat[None] if splits == 1 else flat.new_empty(splits, width, size, dtype=torch.float32)
    run(plan.dweight, arch, grad, images, patch, mean, std, partials, num_prefix, precision)
    if splits > 1:
        run(plan.sum_rows, partials, flat)
    if image_layout(images) == "nhwc":
        return flat.view(width, *patch, channels).permute(0, 3, 1, 2)
    return flat.view(weight.shape)
