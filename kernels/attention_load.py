"""The load stage of attention: a tile of q or k in two parts, normalised and rotated on its way in.

A head of d channels is read as part a and part b, each a power of two wide, because padding d to one would
waste up to half of every product: 72 = 64 + 8, 80 = 64 + 16, 96 = 64 + 32. Rotary positions mix channels in
pairs, so there the parts are the two halves (i with i + d/2) or the even and the odd channels (2i with
2i + 1): a rotation is then elementwise between the parts, and q . k is the sum of two products in any case.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl


class Parts(NamedTuple):
    """How a head's d channels lie in two tiles; a compile-time constant of the kernels.

    Part a holds channels 0, step, 2 step, ... and part b start, start + step, ...; each tile is ``a_width``
    or ``b_width`` lanes wide, of which the first ``a_lanes`` or ``b_lanes`` are channels. ``b_width`` is 0
    where one part suffices.
    """

    dim: int
    a_width: int
    a_lanes: int
    b_width: int
    b_lanes: int
    start: int
    step: int


class Form(NamedTuple):
    """What a call computes, as far as the compiler must know: one compile-time constant of the kernels.

    ``norm`` and ``rope`` name the load stage's work, ``mask`` is "", "bias" or "bool"; ``precision`` is that
    of float32 products; ``int64`` makes offsets within a head 64 bits.
    """

    norm: str
    rope: str
    mask: str
    key_mask: bool
    precision: str
    int64: bool


@cache
def parts_of(dim: int, layout: str = "") -> Parts:
    """The two parts of ``dim`` channels: as they lie, or for rotary positions in ``layout``."""
    if layout:
        half, width = dim // 2, _width(dim // 2)
        interleaved = layout == "interleaved"
        return Parts(dim, width, half, width, half, 1 if interleaved else half, 2 if interleaved else 1)
    whole = _width(dim)
    first = whole // 2
    if dim <= 16 or first + _width(dim - first) >= whole:  # a second part would save nothing
        return Parts(dim, whole, dim, 0, 0, 0, 1)
    return Parts(dim, first, first, _width(dim - first), dim - first, first, 1)


def _width(lanes: int) -> int:
    """A power of two, and at least the 16 that tensor cores multiply at a time."""
    return max(16, triton.next_power_of_2(lanes))


@triton.jit
def load_part(
    ptr,
    rows,
    stride,
    count,
    START: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    EDGE: tl.constexpr,
    stride_lane=None,
):
    """One part of the tile [rows, WIDTH]; zeros past ``count`` rows (if EDGE) and past LANES."""
    channels = START + STEP * tl.arange(0, WIDTH)
    if stride_lane is not None:
        channels *= stride_lane
    places = ptr + rows[:, None] * stride + channels[None, :]
    if EDGE or LANES < WIDTH:
        inside = (rows < count)[:, None] & (tl.arange(0, WIDTH) < LANES)[None, :]
        return tl.load(places, mask=inside, other=0.0)
    return tl.load(places)


@triton.jit
def load_parts(ptr, rows, stride, count, P: tl.constexpr, EDGE: tl.constexpr, stride_lane=None):
    """Both parts of a tile as they lie in memory; b is a where there is none.

    ``stride_lane`` is given only for a tensor whose channels are not side by side.
    """
    a = load_part(ptr, rows, stride, count, 0, P.step, P.a_width, P.a_lanes, EDGE, stride_lane)
    b = a
    if P.b_width > 0:
        b = load_part(ptr, rows, stride, count, P.start, P.step, P.b_width, P.b_lanes, EDGE, stride_lane)
    return a, b


@triton.jit
def store_part(
    ptr,
    part,
    rows,
    stride,
    count,
    START: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes = tl.arange(0, WIDTH)
    places = ptr + rows[:, None] * stride + (START + STEP * lanes)[None, :]
    tl.store(places, part.to(ptr.dtype.element_ty), mask=(rows < count)[:, None] & (lanes < LANES)[None, :])


@triton.jit
def store_parts(ptr, a, b, rows, stride, count, P: tl.constexpr):
    """Both parts to rows below ``count``, rounded to the type that ``ptr`` points to."""
    store_part(ptr, a, rows, stride, count, 0, P.step, P.a_width, P.a_lanes)
    if P.b_width > 0:
        store_part(ptr, b, rows, stride, count, P.start, P.step, P.b_width, P.b_lanes)


@triton.jit
def row_sum(a, b, P: tl.constexpr):
    """The sum over a row's channels in both parts."""
    total = tl.sum(a, axis=1)
    if P.b_width > 0:
        total += tl.sum(b, axis=1)
    return total


@triton.jit
def standardize(a, b, eps, P: tl.constexpr, F: tl.constexpr):
    """(x - mean) / std of each row in float32, or x / rms; also 1 / std. Other lanes stay zero."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if F.norm == "layer_norm":
        mean = row_sum(a, b, P) / P.dim
        a = tl.where((tl.arange(0, P.a_width) < P.a_lanes)[None, :], a - mean[:, None], 0.0)
        if P.b_width > 0:
            b = tl.where((tl.arange(0, P.b_width) < P.b_lanes)[None, :], b - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(row_sum(a * a, b * b, P) / P.dim + eps)
    return a * rstd[:, None], b * rstd[:, None], rstd


@triton.jit
def load_channels(ptr, P: tl.constexpr):
    """A vector [d] over the channels in float32, in both parts; zeros past them."""
    a_lanes = tl.arange(0, P.a_width)
    a = tl.load(ptr + P.step * a_lanes, mask=a_lanes < P.a_lanes, other=0.0).to(tl.float32)
    b = a
    if P.b_width > 0:
        b_lanes = tl.arange(0, P.b_width)
        b = tl.load(ptr + P.start + P.step * b_lanes, mask=b_lanes < P.b_lanes, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def load_angles(ptr, rows, rope, P: tl.constexpr, NEUTRAL: tl.constexpr):
    """A rotary table's rows for these tokens in float32; NEUTRAL for prefix tokens, which are not rotated."""
    _, _, stride, prefix, tokens = rope
    lanes = tl.arange(0, P.a_width)
    inside = ((rows >= prefix) & (rows < tokens))[:, None] & (lanes < P.a_lanes)[None, :]
    places = ptr + (rows - prefix)[:, None] * stride + (P.step * lanes)[None, :]
    a = tl.load(places, mask=inside, other=NEUTRAL).to(tl.float32)
    b = tl.load(places + P.start, mask=inside, other=NEUTRAL).to(tl.float32)
    return a, b


@triton.jit
def prepare(a, b, rows, norm, rope, P: tl.constexpr, F: tl.constexpr):
    """Normalise, then rotate, in float32; rounded once. ``norm`` is (weight, bias, eps), ``rope`` (cos, sin,
    stride of a row, prefix, tokens), with pointers that are None where there is nothing.
    """
    weight_ptr, bias_ptr, eps = norm
    dtype = a.dtype
    if F.norm != "":
        a, b, _ = standardize(a, b, eps, P, F)
        if weight_ptr is not None:
            weight_a, weight_b = load_channels(weight_ptr, P)
            a *= weight_a[None, :]
            b *= weight_b[None, :]
        if bias_ptr is not None:
            bias_a, bias_b = load_channels(bias_ptr, P)
            a += bias_a[None, :]
            b += bias_b[None, :]
    if F.rope != "":
        a, b = a.to(tl.float32), b.to(tl.float32)
        cos_a, cos_b = load_angles(rope[0], rows, rope, P, 1.0)
        sin_a, sin_b = load_angles(rope[1], rows, rope, P, 0.0)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return a.to(dtype), b.to(dtype)


@triton.jit
def prepare_backward(
    grad_a, grad_b, ptr, rows, stride, norm, rope, sums_ptr, count, P: tl.constexpr, F: tl.constexpr
):
    """The gradient of a raw tile from that of the prepared one, both float32.

    If ``sums_ptr`` is not None, this tile's share of the gradients of norm weight and bias goes there
    [2, d]: each program has a place of its own, and the shares are added up in a fixed order.
    """
    weight_ptr, _, eps = norm
    if F.rope != "":
        cos_a, cos_b = load_angles(rope[0], rows, rope, P, 1.0)
        sin_a, sin_b = load_angles(rope[1], rows, rope, P, 0.0)
        grad_a, grad_b = grad_a * cos_a + grad_b * sin_b, grad_b * cos_b - grad_a * sin_a
    if F.norm != "":
        raw_a, raw_b = load_parts(ptr, rows, stride, count, P, True)
        x_a, x_b, rstd = standardize(raw_a, raw_b, eps, P, F)
        inside = (rows < count)[:, None]
        grad_a, grad_b = tl.where(inside, grad_a, 0.0), tl.where(inside, grad_b, 0.0)
        if sums_ptr is not None:
            store_sums(sums_ptr, tl.sum(grad_a * x_a, axis=0), tl.sum(grad_b * x_b, axis=0), P)
            store_sums(sums_ptr + P.dim, tl.sum(grad_a, axis=0), tl.sum(grad_b, axis=0), P)
        if weight_ptr is not None:
            weight_a, weight_b = load_channels(weight_ptr, P)
            grad_a *= weight_a[None, :]
            grad_b *= weight_b[None, :]
        along = row_sum(grad_a * x_a, grad_b * x_b, P) / P.dim
        mean = tl.zeros_like(along)
        if F.norm == "layer_norm":
            mean = row_sum(grad_a, grad_b, P) / P.dim
        grad_a = (grad_a - mean[:, None] - x_a * along[:, None]) * rstd[:, None]
        grad_b = (grad_b - mean[:, None] - x_b * along[:, None]) * rstd[:, None]
    return grad_a, grad_b


@triton.jit
def store_sums(ptr, a, b, P: tl.constexpr):
    a_lanes = tl.arange(0, P.a_width)
    tl.store(ptr + P.step * a_lanes, a, mask=a_lanes < P.a_lanes)
    if P.b_width > 0:
        b_lanes = tl.arange(0, P.b_width)
        tl.store(ptr + P.start + P.step * b_lanes, b, mask=b_lanes < P.b_lanes)
