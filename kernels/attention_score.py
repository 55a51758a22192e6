"""From tiles of q and k to logits, for the kernels of both directions."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_load import load_parts, prepare, store_parts

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What masks add is finite down to here: beside it logits vanish, and float32 has room below.
LOWEST = tl.constexpr(-(2.0**100))


@triton.jit
def await_the_stream(EARLY: tl.constexpr):
    """A kernel's first statement: wait for all that the stream holds before, and let the next kernel begin.

    No memory may be read or written ahead of it.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def head_start(ptr, batch, head, stride_batch, stride_head):
    """Where a head of an image begins, in 64 bits."""
    return ptr + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def indices(start, WIDTH: tl.constexpr, F: tl.constexpr):
    """start, start + 1, ...: in 64 bits where an offset within a head may need them."""
    rows = start + tl.arange(0, WIDTH)
    return rows.to(tl.int64) if F.int64 else rows


@triton.jit
def load_prepared(source, rows, rope, count, F: tl.constexpr, QK: tl.constexpr, EDGE: tl.constexpr):
    """A tile of q or k, ready for its product; ``source`` is (pointer, stride of a row, norm)."""
    a, b = load_parts(source[0], rows, source[1], count, QK, EDGE)
    return prepare(a, b, rows, source[2], rope, QK, F)


@triton.jit
def product(a, b, other_a, other_b, P: tl.constexpr, F: tl.constexpr):
    """a other_a^T + b other_b^T: rows of one tile by rows of another, in float32."""
    s = tl.dot(a, tl.trans(other_a), input_precision=F.precision)
    if P.b_width > 0:
        s = tl.dot(b, tl.trans(other_b), s, input_precision=F.precision)
    return s


@triton.jit
def zeros(ROWS: tl.constexpr, P: tl.constexpr):
    """An accumulator in both parts; b is a where there is none."""
    A: tl.constexpr = P.a_width
    B: tl.constexpr = P.b_width
    a = tl.zeros([ROWS, A], tl.float32)
    b = a
    if B > 0:
        b = tl.zeros([ROWS, B], tl.float32)
    return a, b


@triton.jit
def accumulate(acc_a, acc_b, weights, a, b, P: tl.constexpr, F: tl.constexpr):
    """acc + weights [a, b], the weights rounded to the operands' type as torch's fused op does."""
    acc_a = tl.dot(weights.to(a.dtype), a, acc_a, input_precision=F.precision)
    if P.b_width > 0:
        acc_b = tl.dot(weights.to(b.dtype), b, acc_b, input_precision=F.precision)
    return acc_a, acc_b


@triton.jit
def pass_blocks(
    step: tl.constexpr,
    state,
    own,
    sources,
    count,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """The state after ``step`` took ``count`` keys or queries into it, WIDTH at a time, the rest TAIL wide.

    TAIL_FIRST takes the rest first: behind a loop of wgmma it would make each of them wait for itself.
    """
    full = count // WIDTH * WIDTH
    for part in tl.static_range(2):
        if part == (0 if TAIL_FIRST else 1):
            if TAIL > 0:
                state = step(state, own, full, sources, F, QK, V, TAIL, True)
        else:
            for start in range(0, full, WIDTH):
                state = step(state, own, start, sources, F, QK, V, WIDTH, False)
    return state


@triton.jit
def along(places, stride):
    """Offsets of elements that lie side by side (stride None) or not. The first need one register a row."""
    return places if stride is None else places * stride


@triton.jit
def masked(s, queries, keys, scale, masks, count, F: tl.constexpr, EDGE: tl.constexpr):
    """Logits with masks, and what to multiply them by to have them in units of log 2.

    ``queries`` and ``keys`` number the tile's two axes, one as a row and one as a column. ``masks`` is
    (pointer, stride of a query, stride of a key, pointer of the key mask, its stride). A masked key gets -inf
    added, not put in its place: NaN and inf then spread as they do in torch's op. Keys past the last are
    another matter: they are none, whatever their product is.
    """
    mask_ptr, stride_query, stride_key, key_mask_ptr, stride = masks
    factor = scale * LOG2E
    if F.mask != "" or F.key_mask:
        s *= factor
        factor = 1.0
    if F.key_mask:
        seen = tl.load(key_mask_ptr + along(keys, stride), mask=keys < count, other=1)
        s += tl.where(seen != 0, 0.0, float("-inf"))
    if F.mask != "":
        inside = (queries < count) & (keys < count)
        value = tl.load(mask_ptr + queries * stride_query + along(keys, stride_key), mask=inside, other=0)
        if F.mask == "bool":
            # A query past the last sees every key: its row is not stored, and must not look masked.
            s += tl.where((value != 0) | (queries >= count), 0.0, float("-inf"))
        else:
            value = value.to(tl.float32)
            # In units of log 2 the least float32, which libraries mask with, would be -inf.
            s += tl.where((value > float("-inf")) & (value < LOWEST / LOG2E), LOWEST, value * LOG2E)
    if EDGE:
        s = tl.where(keys < count, s, float("-inf"))
    return s, factor


@triton.jit
def load_outputs(out, grad, rows, tokens, V: tl.constexpr, F: tl.constexpr):
    """The output's gradient; base and log-sum-exp in units of log 2, the weights being exp2(s - base - lse);
    and delta = sum of output times gradient.

    The log-sum-exp of a row that saw no key, or is none, becomes inf: its weights exp(s - inf) are zero.
    """
    out_ptr, stride_out, lse_ptr = out
    grad_a, grad_b = load_parts(grad[0], rows, grad[1], tokens, V, True, grad[2])
    out_a, out_b = load_parts(out_ptr, rows, stride_out, tokens, V, True)
    delta = tl.sum(out_a.to(tl.float32) * grad_a.to(tl.float32), axis=1)
    if V.b_width > 0:
        delta += tl.sum(out_b.to(tl.float32) * grad_b.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + rows, mask=rows < tokens, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    base, lse = lse_parts(lse, F)
    return grad_a, grad_b, base, lse, delta


@triton.jit
def weights_of(s, factor, base, lse, F: tl.constexpr):
    """The softmax's weights once more, from what the forward kept of each row."""
    if F.mask == "bias":
        s -= base
    return tl.exp2(s * factor - lse)


@triton.jit
def store_facts(ptr, base, lse, delta, rows, tokens):
    """What the other launch wants of each row: 16 bytes, the last four of them zero.

    A vector of floats each thread would read for itself, as many as it multiplies with, one by one; a tile as
    large as the program has threads is read once.
    """
    lanes = tl.arange(0, 4)[None, :]
    facts = tl.where(lanes == 0, lse[:, None], tl.where(lanes == 1, delta[:, None], 0.0))
    facts = tl.where(lanes == 2, base[:, None], facts)
    tl.store(ptr + rows[:, None] * 4 + lanes, facts, mask=(rows < tokens)[:, None])


@triton.jit
def load_facts(ptr, rows, tokens, F: tl.constexpr, EDGE: tl.constexpr):
    """Base and log-sum-exp, inf for a row that is none, and delta."""
    lanes = tl.arange(0, 4)[None, :]
    places = ptr + rows[:, None] * 4 + lanes
    if EDGE:
        facts = tl.load(places, mask=(rows < tokens)[:, None], other=0.0)
    else:
        facts = tl.load(places)
    lse = tl.sum(tl.where(lanes == 0, facts, 0.0), axis=1)
    if EDGE:
        lse = tl.where(rows < tokens, lse, float("inf"))
    base = lse
    if F.mask == "bias":
        base = tl.sum(tl.where(lanes == 2, facts, 0.0), axis=1)
    return base, lse, tl.sum(tl.where(lanes == 1, facts, 0.0), axis=1)


@triton.jit
def finite(top):
    """The maximum to subtract: zero for a row that has seen no key, where -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def lse_of(top, total, F: tl.constexpr):
    """The log-sum-exp that is kept. Where a float mask made the whole row LOWEST, log2(total) would vanish
    beside it, and the backward needs it: there LOWEST (1 + log2(total) / 32) stands for it.
    """
    lse = (finite(top) + tl.log2(total)) * LN2
    if F.mask == "bias":
        lse = tl.where(top == LOWEST, LOWEST + LOWEST / 32 * tl.log2(total), lse)
    return lse


@triton.jit
def lse_parts(lse, F: tl.constexpr):
    """What ``lse_of`` kept, in units of log 2: the row's LOWEST or 0, and the rest."""
    base, rest = tl.zeros_like(lse), lse * LOG2E
    if F.mask == "bias":
        low = lse <= LOWEST
        base = tl.where(low, LOWEST, 0.0)
        rest = tl.where(low, (lse / LOWEST - 1) * 32, rest)
    return base, rest


@triton.jit
def finish(state, rows, out, tokens, V: tl.constexpr, F: tl.constexpr):
    """Divide by the sum and store; a row with no key to see is zeros, and its log-sum-exp -inf."""
    acc_a, acc_b, top, total = state
    out_ptr, stride, lse_ptr = out
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_parts(out_ptr, acc_a * share[:, None], acc_b * share[:, None], rows, stride, tokens, V)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, lse_of(top, total, F), mask=rows < tokens)
