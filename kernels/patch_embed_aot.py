"""patch_embed's launches for the ahead-of-time compiler: every entry of the tables, options pairwise."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import patch_embed_plan as plan
from .launch import Launch
from .patch_embed_projection import flatten_weight, project

WIDTH, GRID = 768, 14

# Kernel, dtype class, pixels, their memory, patch, batch, options. Every entry of the tables, every dtype,
# layout and patch size, and each option with and without. Dropped: their product.
CASES = (
    ("fwd", "half", "float", "nchw", 16, 1, "bias positions prefix"),
    ("fwd", "half", "uint8", "nhwc", 14, 8, "patches prefix"),
    ("fwd", "half", "float", "nchw", 16, 256, "bias positions prefix"),
    ("fwd", "half", "uint8", "nchw", 8, 256, "positions"),
    ("fwd", "half", "float", "strided", 5, 256, "bias"),
    ("fwd", "tf32", "float", "nchw", 14, 256, "bias positions prefix colours"),
    ("fwd", "ieee", "float", "nhwc", 32, 64, "patches prefix colours"),
    ("dweight", "half", "float", "nchw", 16, 256, ""),
    ("dweight", "half", "uint8", "nhwc", 14, 256, "colours prefix"),
    ("dweight", "tf32", "float", "nchw", 32, 64, "prefix colours"),
    ("dweight", "ieee", "float", "strided", 5, 256, ""),
    ("dimages", "half", "float", "nchw", 14, 256, "prefix"),
    ("dimages", "tf32", "float", "nhwc", 16, 256, "colours transposed"),
    ("dimages", "ieee", "float", "nchw", 16, 64, ""),
    ("sums", "half", "float", "nchw", 16, 256, "positions prefix"),
)


def aot_launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """Label and launch of everything that is shipped for an architecture, planned on meta tensors."""
    for kernel, dtype, pixels, memory, patch, batch, options in CASES:
        label = f"{dtype} {pixels} {memory} patch={patch} B={batch} {options}".strip()
        for launch in _launches(arch, kernel, dtype, pixels, memory, patch, batch, options.split()):
            yield label, launch


def _launches(
    arch: str,
    kernel: str,
    dtype_class: str,
    pixels: str,
    memory: str,
    patch: int,
    batch: int,
    options: list[str],
) -> Iterator[Launch]:
    dtype = torch.bfloat16 if dtype_class == "half" else torch.float32
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    sides = patch, patch
    images = _images(batch, GRID * patch, torch.uint8 if pixels == "uint8" else dtype, memory)
    weight, bias = _meta(WIDTH, 3, *sides, dtype=dtype), _meta(WIDTH, dtype=dtype)
    mean = std = _meta(3) if "colours" in options else None
    num_prefix = int("prefix" in options)
    prefix = _meta(1, 1, WIDTH, dtype=dtype) if num_prefix else None
    positions = GRID**2 + num_prefix * ("positions" in options)
    pos_embed = _meta(1, positions, WIDTH, dtype=dtype) if {"positions", "patches"} & {*options} else None
    tokens = _meta(batch, num_prefix + GRID**2, WIDTH, dtype=dtype)
    if "transposed" in options:
        tokens = tokens.mT.contiguous().mT
    if kernel == "fwd":
        projection = project(images, weight, bias if "bias" in options else None, mean, std)
        yield plan.fwd(arch, images, sides, projection, pos_embed, prefix, tokens, precision)
    elif kernel == "dweight":
        size = weight[0].numel()
        partials = _meta(plan.dweight_splits(arch, tokens, size, num_prefix, precision), WIDTH, size)
        yield plan.dweight(arch, tokens, images, sides, mean, std, partials, num_prefix, precision)
    elif kernel == "dimages":
        flat = flatten_weight(weight, memory)
        yield plan.dimages(arch, tokens, flat, sides, std, images, num_prefix, precision)
    else:
        sums = _meta(GRID**2, WIDTH)
        yield plan.sum_images(tokens, pos_embed, prefix, sums, num_prefix)
        yield plan.sum_rows(sums, bias)


def _images(batch: int, side: int, dtype: torch.dtype, memory: str) -> Tensor:
    if memory == "strided":
        return _meta(batch, 3, side, 2 * side, dtype=dtype)[..., ::2]
    images = _meta(batch, 3, side, side, dtype=dtype)
    return images.to(memory_format=torch.channels_last) if memory == "nhwc" else images


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
