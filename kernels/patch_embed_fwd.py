"""patch_embed, forward: one GEMM that reads the patches where they lie in the images.

A patch is row m of [B * num_patches, K] and its pixels are k of K, counted in the order in which they lie in
memory: (channel, y, x) for "nchw" and "strided" images, (y, x, channel) for "nhwc". The weight is [D, K] in
that same order, its rows padded with zeros to a multiple of 8, so that it is read 16 bytes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def pixel_offsets(
    k,
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where pixels k of a patch lie, in elements from its first, and their channels."""
    if LAYOUT == "nhwc":
        x = k % (PATCH_W * CHANNELS)
        return tl.multiple_of(k // (PATCH_W * CHANNELS) * stride_h, ALIGN) + x, x % CHANNELS
    x = k % PATCH_W
    channel = k // (PATCH_H * PATCH_W)
    row = tl.multiple_of(channel * stride_c + k // PATCH_W % PATCH_H * stride_h, ALIGN)
    return row + x * (1 if LAYOUT == "nchw" else stride_w), channel


@triton.jit
def patch_offsets(
    image,
    y,
    x,
    stride_b,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where patches (y, x) of the images start, in elements."""
    step = PATCH_W * (CHANNELS if LAYOUT == "nhwc" else 1 if LAYOUT == "nchw" else stride_w)
    return tl.multiple_of(image.to(tl.int64) * stride_b + y * (PATCH_H * stride_h), ALIGN) + x * step


@triton.jit
def normalized(pixels, channel, mean, std, DTYPE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels [rows, K] as the weight meets them: bytes in 0..1, then (pixels - mean) / std, rounded to DTYPE.

    float32 divides as torch does: a reciprocal's error is the same in every pixel and adds up over a patch.
    """
    x = pixels.to(tl.float32)
    if pixels.dtype == tl.uint8:
        x = tl.math.div_rn(x, 255.0) if tl.float32 == DTYPE else x * (1 / 255)
    if mean is not None:
        x -= tl.load(mean + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    if std is not None:
        scale = tl.load(std + channel, mask=channel < CHANNELS, other=1.0)[None, :]
        x = tl.math.div_rn(x, tl.broadcast_to(scale, x.shape)) if tl.float32 == DTYPE else x * (1 / scale)
    return x.to(DTYPE)


@triton.jit(
    do_not_specialize=[
        *("stride_b", "stride_c", "stride_h", "stride_w"),
        *("rows", "num_patches", "grid_w", "num_prefix", "pos_prefix"),
    ]
)
def patch_embed_fwd_kernel(
    images,
    weight,
    bias,
    pos_embed,
    prefix,
    mean,
    std,
    out,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    rows,
    num_patches,
    grid_w,
    num_prefix,
    pos_prefix,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_D] tile of the tokens; the programs behind those of the patches write prefix rows.

    ``rows`` is B * num_patches; the first ``pos_prefix`` rows of pos_embed are for the prefix. With mean or
    std, pixels are normalised as they are loaded; otherwise bytes count as 256ths (see fold).
    """
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    PADDED: tl.constexpr = (K + 7) // 8 * 8
    tiles_d: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    tokens = num_prefix + num_patches
    # The tiles that read the same patches are neighbours: an image comes from memory once.
    tile_m = tl.program_id(0) // tiles_d
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = d < WIDTH
    tiles_m = tl.cdiv(rows, BLOCK_M)

    if prefix is not None:  # noqa: SIM102  this one is decided when compiling
        if tile_m >= tiles_m:
            m = (tile_m - tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
            image, token = m // num_prefix, m % num_prefix
            inside = (m < rows // num_patches * num_prefix)[:, None] & in_width[None, :]
            at = token[:, None] * WIDTH + d[None, :]
            value = tl.load(prefix + at, mask=inside, other=0.0).to(tl.float32)
            if pos_embed is not None:
                value += tl.load(pos_embed + at, mask=inside & (token < pos_prefix)[:, None], other=0.0)
            at += (image.to(tl.int64) * tokens * WIDTH)[:, None]
            tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
            return

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if INT64:
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < rows
    # Rows and columns over the edge compute the last one again, and are not stored.
    m = tl.minimum(m, rows - 1)
    image, patch = m // num_patches, m % num_patches
    starts = images + patch_offsets(
        *(image, patch // grid_w, patch % grid_w, stride_b, stride_h, stride_w),
        *(CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
    )
    weights = weight + tl.minimum(d, WIDTH - 1) * PADDED

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at, channel = pixel_offsets(
            *(k.to(tl.int64) if INT64 else k, stride_c, stride_h, stride_w),
            *(CHANNELS, PATCH_H, PATCH_W, LAYOUT, ALIGN),
        )
        if K % BLOCK_K == 0:
            x = tl.load(starts[:, None] + at[None, :])
            w = tl.load(weights[:, None] + k[None, :])
        else:
            x = tl.load(starts[:, None] + at[None, :], mask=(k < K)[None, :], other=0)
            w = tl.load(weights[:, None] + k[None, :], mask=(k < PADDED)[None, :], other=0.0)
        if mean is not None or std is not None:
            x = normalized(x, channel, mean, std, w.dtype, CHANNELS)
        acc = tl.dot(x.to(w.dtype), w.trans(), acc, input_precision=PRECISION)

    if images.dtype.element_ty == tl.uint8 and mean is None and std is None:
        acc *= 1 / 256
    inside = in_rows[:, None] & in_width[None, :]
    if bias is not None:
        acc += tl.load(bias + d, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if pos_embed is not None:
        at = (pos_prefix + patch)[:, None] * WIDTH + d[None, :]
        acc += tl.load(pos_embed + at, mask=inside, other=0.0)
    at = ((image.to(tl.int64) * tokens + num_prefix + patch) * WIDTH)[:, None] + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
