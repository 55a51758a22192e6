"""patch_embed's launches, planned from shapes, strides and dtypes alone."""

import math

from torch import Tensor

from . import patch_embed_bwd as bwd
from .launch import Launch, needs_int64
from .patch_embed_fwd import patch_embed_fwd_kernel
from .patch_embed_projection import Projection, image_layout
from .tiles import MULTIPROCESSORS, Tile, dtype_class, tile

WAVES = 2  # programs of the weight's gradient for each multiprocessor: two fit on one
MIN_STEPS = 4  # of a program's loop over rows: a shorter one is all start and end


def fwd(
    arch: str,
    images: Tensor,
    patch: tuple[int, int],
    projection: Projection,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    out: Tensor,
    precision: str,
) -> Launch:
    """The forward launch: tiles of the patches' tokens, then those of the prefix tokens."""
    batch, tokens, width = out.shape
    num_prefix = 0 if prefix is None else prefix.shape[1]
    num_patches = tokens - num_prefix
    rows = batch * num_patches
    chosen = tile("patch_embed_fwd", arch, dtype_class(out.dtype, precision), tokens=rows)
    block = chosen.constants["BLOCK_M"]
    tiles_m = _cdiv(rows, block) + _cdiv(batch * num_prefix, block)
    args = {
        "images": images,
        **projection._asdict(),
        "pos_embed": None if pos_embed is None else pos_embed.contiguous(),
        "prefix": prefix.contiguous() if num_prefix else None,
        "out": out,
        **_strides(images, patch),
        "rows": rows,
        "num_patches": num_patches,
        "num_prefix": num_prefix,
        "pos_prefix": 0 if pos_embed is None else pos_embed.shape[1] - num_patches,
    }
    constants = _geometry(images, patch, width) | {"INT64": needs_int64(images, out), "PRECISION": precision}
    return _launch(
        patch_embed_fwd_kernel, tiles_m * _cdiv(width, chosen.constants["BLOCK_D"]), args, constants, chosen
    )


def dweight(
    arch: str,
    grad: Tensor,
    images: Tensor,
    patch: tuple[int, int],
    mean: Tensor | None,
    std: Tensor | None,
    partials: Tensor,
    num_prefix: int,
    precision: str,
) -> Launch:
    """The split GEMM of the weight's gradient: partials [splits, D, K]."""
    batch, tokens, width = grad.shape
    num_patches = tokens - num_prefix
    chosen = _dweight_tile(arch, grad, num_prefix, precision)
    splits, _, size = partials.shape
    steps = _cdiv(batch * num_patches, chosen.constants["BLOCK_M"])
    args = {
        "grad": grad,
        "images": images,
        "mean": mean,
        "std": std,
        "partials": partials,
        **_grad_strides(grad),
        **_strides(images, patch),
        "rows": batch * num_patches,
        "chunk": _cdiv(steps, splits) * chosen.constants["BLOCK_M"],
        "num_patches": num_patches,
        "num_prefix": num_prefix,
    }
    constants = {
        **_geometry(images, patch, width),
        **_grad_constants(grad),
        "INT64": needs_int64(images, grad, partials),
        "PRECISION": precision,
    }
    return _launch(
        bwd.patch_embed_dweight_kernel, _dweight_tiles(chosen, width, size) * splits, args, constants, chosen
    )


def dweight_splits(arch: str, grad: Tensor, size: int, num_prefix: int, precision: str) -> int:
    """Into how many chunks of rows the weight's gradient is split: as few as keep the GPU busy."""
    batch, tokens, width = grad.shape
    chosen = _dweight_tile(arch, grad, num_prefix, precision)
    steps = _cdiv(batch * (tokens - num_prefix), chosen.constants["BLOCK_M"])
    wanted = WAVES * MULTIPROCESSORS.get(arch, 8) // _dweight_tiles(chosen, width, size)
    splits = max(1, min(wanted, steps // MIN_STEPS))
    return _cdiv(steps, _cdiv(steps, splits)) if steps else 1


def dimages(
    arch: str,
    grad: Tensor,
    weight: Tensor,
    patch: tuple[int, int],
    std: Tensor | None,
    dimages: Tensor,
    num_prefix: int,
    precision: str,
) -> Launch:
    """The GEMM of the images' gradient; ``weight`` is flattened in the order of ``dimages``'s pixels."""
    batch, tokens, width = grad.shape
    num_patches = tokens - num_prefix
    rows = batch * num_patches
    chosen = tile("patch_embed_dimages", arch, dtype_class(grad.dtype, precision), tokens=rows)
    args = {
        "grad": grad,
        "weight": weight,
        "std": std,
        "dimages": dimages,
        **_grad_strides(grad),
        **_strides(dimages, patch),
        "rows": rows,
        "num_patches": num_patches,
        "num_prefix": num_prefix,
    }
    constants = {
        **_geometry(dimages, patch, width),
        **_grad_constants(grad),
        "INT64": needs_int64(dimages, grad),
        "PRECISION": precision,
    }
    tiles_k = _cdiv(dimages.shape[1] * math.prod(patch), chosen.constants["BLOCK_K"])
    programs = _cdiv(rows, chosen.constants["BLOCK_M"]) * tiles_k
    return _launch(bwd.patch_embed_dimages_kernel, programs, args, constants, chosen)


def sum_images(
    grad: Tensor, dpos: Tensor | None, dprefix: Tensor | None, patch_sums: Tensor | None, num_prefix: int
) -> Launch:
    """Sums over the batch, straight into dpos and dprefix, and in float32 for the bias."""
    batch, tokens, width = grad.shape
    args = {
        "grad": grad,
        "dpos": dpos,
        "dprefix": dprefix,
        "patch_sums": patch_sums,
        **_grad_strides(grad),
        "batch": batch,
        "num_prefix": num_prefix,
        "pos_prefix": 0 if dpos is None else dpos.shape[1] - (tokens - num_prefix),
    }
    constants = {"WIDTH": width, **_grad_constants(grad), "BLOCK_B": 16, "BLOCK_D": 128}
    return Launch(bwd.patch_embed_sum_images_kernel, (tokens * _cdiv(width, 128),), args, constants)


def sum_rows(partials: Tensor, out: Tensor) -> Launch:
    """float32 partials [rows, ...] summed over the rows into out [...]."""
    rows, columns = partials.shape[0], out.numel()
    block_r = min(128, 1 << max(rows - 1, 0).bit_length())
    constants = {"COLUMNS": columns, "BLOCK_R": block_r, "BLOCK_C": 4096 // block_r}
    args = {"partials": partials, "out": out, "rows": rows}
    return Launch(bwd.patch_embed_sum_rows_kernel, (_cdiv(columns, constants["BLOCK_C"]),), args, constants)


def _dweight_tile(arch: str, grad: Tensor, num_prefix: int, precision: str) -> Tile:
    rows = grad.shape[0] * (grad.shape[1] - num_prefix)
    return tile("patch_embed_dweight", arch, dtype_class(grad.dtype, precision), tokens=rows)


def _dweight_tiles(chosen: Tile, width: int, size: int) -> int:
    return _cdiv(width, chosen.constants["BLOCK_D"]) * _cdiv(size, chosen.constants["BLOCK_K"])


def _launch(kernel, programs: int, args: dict, constants: dict, chosen: Tile) -> Launch:
    return Launch(
        kernel, (programs,), args, constants | chosen.constants, chosen.num_warps, chosen.num_stages
    )


def _strides(images: Tensor, patch: tuple[int, int]) -> dict[str, int]:
    names = ("stride_b", "stride_c", "stride_h", "stride_w")
    return dict(zip(names, images.stride(), strict=True)) | {"grid_w": images.shape[3] // patch[1]}


def _geometry(images: Tensor, patch: tuple[int, int], width: int) -> dict[str, int | str]:
    layout = image_layout(images)
    stride_b, stride_c, stride_h, _ = images.stride()
    return {
        "CHANNELS": images.shape[1],
        "PATCH_H": patch[0],
        "PATCH_W": patch[1],
        "WIDTH": width,
        "LAYOUT": layout,
        # gcd(16, ...): as many elements as a thread reads at once, if they are bytes.
        "ALIGN": math.gcd(16, stride_b, stride_h, 0 if layout == "nhwc" else stride_c),
    }


def _grad_strides(grad: Tensor) -> dict[str, int]:
    return dict(zip(("grad_b", "grad_t", "grad_d"), grad.stride(), strict=True))


def _grad_constants(grad: Tensor) -> dict[str, int | bool]:
    return {"GRAD_CONTIGUOUS": grad.stride(2) == 1, "GRAD_ALIGN": math.gcd(8, *grad.stride()[:2])}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
