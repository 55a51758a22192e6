"""patch_embed, backward: two GEMMs on patches where they lie in the images, and sums in a fixed order."""

import triton
import triton.language as tl

from .patch_embed_fwd import normalized, patch_offsets, pixel_offsets


@triton.jit(
    do_not_specialize=[
        *("grad_b", "grad_t", "grad_d", "stride_b", "stride_c", "stride_h", "stride_w"),
        *("rows", "chunk", "num_patches", "grid_w", "num_prefix"),
    ]
)
def patch_embed_dweight_kernel(
    grad,
    images,
    mean,
    std,
    partials,
    grad_b,
    grad_t,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    rows,
    chunk,
    num_patches,
    grid_w,
    num_prefix,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [BLOCK_D, BLOCK_K] tile of grad^T @ patches over ``chunk`` of the rows: partials [splits, D, K]."""
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    DTYPE: tl.constexpr = grad.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if INT64 else tl.int32
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_d: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    # The tiles of a chunk are neighbours and advance together: its rows come from memory once.
    tile = tl.program_id(0) % (tiles_d * tiles_k)
    split = (tl.program_id(0) // (tiles_d * tiles_k)).to(INDEX)
    d = (tile // tiles_k * BLOCK_D + tl.arange(0, BLOCK_D)).to(INDEX)
    k = (tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(INDEX)
    offsets, channel = pixel_offsets(
        *(k, stride_c, stride_h, stride_w, CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
    )
    pixels = images + offsets
    grads = grad + d * (1 if GRAD_CONTIGUOUS else grad_d)

    start = split * chunk
    stop = tl.minimum(start + chunk, rows)
    m = start + tl.arange(0, BLOCK_M)
    image, patch = m // num_patches, m % num_patches
    y, x = patch // grid_w, patch % grid_w
    # Rows advance digit by digit: to divide again for each of them would cost as much as to multiply.
    step_image, step_patch = BLOCK_M // num_patches, BLOCK_M % num_patches
    step_y, step_x = step_patch // grid_w, step_patch % grid_w
    acc = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    # At least once, and known to be: for a loop that may not run, Triton 3.6 has each wgmma wait for itself.
    end = tl.maximum(stop, start + 1)
    tl.assume(start < end)
    for first in range(start, end, BLOCK_M):
        inside = (first + tl.arange(0, BLOCK_M) < stop)[:, None]
        token = num_prefix + y * grid_w + x
        row = tl.multiple_of(image.to(tl.int64) * grad_b + token * grad_t, GRAD_ALIGN)
        g = tl.load(grads[None, :] + row[:, None], mask=inside & (d < WIDTH)[None, :], other=0.0)
        row = patch_offsets(
            *(image, y, x, stride_b, stride_h, stride_w, CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
        )
        pixel = tl.load(pixels[None, :] + row[:, None], mask=inside & (k < K)[None, :], other=0)
        if images.dtype.element_ty == tl.uint8 or mean is not None or std is not None:
            pixel = normalized(pixel, channel, mean, std, DTYPE, CHANNELS)
        acc = tl.dot(g.trans(), pixel, acc, input_precision=PRECISION)
        x += step_x
        carry = (x >= grid_w).to(tl.int32)
        x -= carry * grid_w
        y += step_y + carry
        carry = (y * grid_w >= num_patches).to(tl.int32)
        y -= carry * (num_patches // grid_w)
        image += step_image + carry

    at = ((split * WIDTH + d) * K)[:, None] + k[None, :]
    inside = (d < WIDTH)[:, None] & (k < K)[None, :]
    tl.store(partials + at, acc.to(partials.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("grad_b", "grad_t", "grad_d", "stride_b", "stride_c", "stride_h", "stride_w"),
        *("rows", "num_patches", "grid_w", "num_prefix"),
    ]
)
def patch_embed_dimages_kernel(
    grad,
    weight,
    std,
    dimages,
    grad_b,
    grad_t,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    rows,
    num_patches,
    grid_w,
    num_prefix,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_K] tile of grad @ weight, written back to where its pixels lie."""
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    PADDED: tl.constexpr = (K + 7) // 8 * 8
    INDEX: tl.constexpr = tl.int64 if INT64 else tl.int32
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    k = (tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(INDEX)
    m = (tl.program_id(0) // tiles_k).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < rows)[:, None] & (k < K)[None, :]
    m = tl.minimum(m, rows - 1)
    image, patch = m // num_patches, m % num_patches
    grads = grad + tl.multiple_of(image.to(tl.int64) * grad_b + (num_prefix + patch) * grad_t, GRAD_ALIGN)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, WIDTH, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(INDEX)
        in_width = d < WIDTH
        columns = d * (1 if GRAD_CONTIGUOUS else grad_d)
        g = tl.load(grads[:, None] + columns[None, :], mask=in_width[None, :], other=0.0)
        weights = weight + (d * PADDED)[:, None] + k[None, :]
        w = tl.load(weights, mask=in_width[:, None] & (k < PADDED)[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)

    offsets, channel = pixel_offsets(
        *(k, stride_c, stride_h, stride_w, CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
    )
    if std is not None:
        acc *= 1 / tl.load(std + channel, mask=channel < CHANNELS, other=1.0)[None, :]
    starts = patch_offsets(
        *(image, patch // grid_w, patch % grid_w, stride_b, stride_h, stride_w),
        *(CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
    )
    tl.store(dimages + starts[:, None] + offsets[None, :], acc.to(dimages.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["grad_b", "grad_t", "grad_d", "batch", "num_prefix", "pos_prefix"])
def patch_embed_sum_images_kernel(
    grad,
    dpos,
    dprefix,
    patch_sums,
    grad_b,
    grad_t,
    grad_d,
    batch,
    num_prefix,
    pos_prefix,
    WIDTH: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad of BLOCK_D columns of a token, summed over the batch, to each of three outputs that is wanted.

    dpos [pos_prefix + N, D] and dprefix [num_prefix, D] are gradients; patch_sums [N, D] is float32.
    """
    tiles_d: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    token = tl.program_id(0) // tiles_d
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = d < WIDTH
    columns = grad + tl.multiple_of(token.to(tl.int64) * grad_t, GRAD_ALIGN)
    columns += d.to(tl.int64) * (1 if GRAD_CONTIGUOUS else grad_d)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(0, batch, BLOCK_B):
        image = first + tl.arange(0, BLOCK_B)
        row = tl.multiple_of(image.to(tl.int64) * grad_b, GRAD_ALIGN)
        inside = (image < batch)[:, None] & in_width[None, :]
        total += tl.load(columns[None, :] + row[:, None], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(total, 0)

    if dprefix is not None:
        inside = in_width & (token < num_prefix)
        tl.store(dprefix + token * WIDTH + d, total.to(dprefix.dtype.element_ty), mask=inside)
    if dpos is not None:
        row = token - num_prefix + pos_prefix
        tl.store(dpos + row * WIDTH + d, total.to(dpos.dtype.element_ty), mask=in_width & (row >= 0))
    if patch_sums is not None:
        row = token - num_prefix
        tl.store(patch_sums + row * WIDTH + d, total, mask=in_width & (row >= 0))


@triton.jit(do_not_specialize=["rows"])
def patch_embed_sum_rows_kernel(
    partials, out, rows, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """float32 partials [rows, COLUMNS], summed over the rows and rounded once: out [COLUMNS]."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        total += tl.load(partials + at, mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < COLUMNS)
