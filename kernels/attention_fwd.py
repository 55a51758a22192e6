"""Attention forward under a running softmax: a head's keys stay on the chip if they fit, else they pass."""

# ruff: noqa: RUF005  Triton compiles no (*tuple, more)
import triton
import triton.language as tl

from .attention_load import load_parts
from .attention_options import INTEGERS
from .attention_score import (
    accumulate,
    await_the_stream,
    finish,
    finite,
    head_start,
    indices,
    load_prepared,
    masked,
    pass_blocks,
    product,
    zeros,
)


@triton.jit(do_not_specialize=INTEGERS)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    mask_ptr,
    key_mask_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    scale,
    eps,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_query,
    stride_mask_key,
    stride_key_batch,
    stride_key_token,
    stride_rope_batch,
    stride_rope_head,
    stride_rope_token,
    prefix,
    tokens,
    heads,
    programs,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    EARLY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """Softmax attention of one head, for the query blocks of one of ``programs`` programs.

    CHUNKS, the widths that the keys are cut into, makes the resident form; without it, the online one.
    Strides of q, k, v and the rotary tables come in units of ALIGN elements, for the compiler to see how wide
    it may read. An ``lse_ptr`` of None stores no log-sum-exp.
    """
    await_the_stream(EARLY)
    pid = tl.program_id(0)
    share = pid % programs
    head = pid // programs % heads
    batch = pid // programs // heads
    stride_q, stride_k, stride_v = stride_q_token * ALIGN, stride_k_token * ALIGN, stride_v_token * ALIGN
    q_ptr = head_start(q_ptr, batch, head, stride_q_batch * ALIGN, stride_q_head * ALIGN)
    k_ptr = head_start(k_ptr, batch, head, stride_k_batch * ALIGN, stride_k_head * ALIGN)
    v_ptr = head_start(v_ptr, batch, head, stride_v_batch * ALIGN, stride_v_head * ALIGN)
    stride_out = heads * V.dim
    out_ptr += batch.to(tl.int64) * tokens * stride_out + head * V.dim
    if lse_ptr is not None:
        lse_ptr += (batch.to(tl.int64) * heads + head) * tokens
    if F.rope != "":
        cos_ptr = head_start(cos_ptr, batch, head, stride_rope_batch * ALIGN, stride_rope_head * ALIGN)
        sin_ptr = head_start(sin_ptr, batch, head, stride_rope_batch * ALIGN, stride_rope_head * ALIGN)
    if F.mask != "":
        mask_ptr = head_start(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    if F.key_mask:
        key_mask_ptr = head_start(key_mask_ptr, batch, head, stride_key_batch, 0)

    q = (q_ptr, stride_q, (q_weight_ptr, q_bias_ptr, eps))
    k = (k_ptr, stride_k, (k_weight_ptr, k_bias_ptr, eps))
    v = (v_ptr, stride_v)
    out = (out_ptr, stride_out, lse_ptr)
    rope = (cos_ptr, sin_ptr, stride_rope_token * ALIGN, prefix, tokens)
    masks = (mask_ptr, stride_mask_query, stride_mask_key, key_mask_ptr, stride_key_token)
    sources = (q, k, v, rope, masks, scale, tokens)
    if len(CHUNKS) > 0:
        resident(sources, out, share, programs, F, QK, V, BLOCK_M, CHUNKS)
    else:
        online(sources, out, share, F, QK, V, BLOCK_M, BLOCK_N, TAIL, TAIL_FIRST)


@triton.jit
def resident(
    sources,
    out,
    share,
    programs,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Keys and values are loaded once, in chunks CHUNKS wide, and stay while the query blocks pass.

    The softmax runs over the chunks too: the logits of all at once would leave registers for fewer programs.
    """
    q, k, v, rope, masks, scale, tokens = sources
    C: tl.constexpr = len(CHUNKS)
    keys, ks, vs = (), (), ()
    first = 0
    for c in tl.static_range(C):
        keys = keys + (indices(first, CHUNKS[c], F),)
        ks = ks + (load_prepared(k, keys[c], rope, tokens, F, QK, c + 1 == C),)
        vs = vs + (load_parts(v[0], keys[c], v[1], tokens, V, c + 1 == C),)
        first += CHUNKS[c]

    for start in range(share * BLOCK_M, tokens, programs * BLOCK_M):
        rows = indices(start, BLOCK_M, F)
        q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
        state = fresh(BLOCK_M, V)
        for c in tl.static_range(C):
            s = product(q_a, q_b, ks[c][0], ks[c][1], QK, F)
            s, factor = masked(s, rows[:, None], keys[c][None, :], scale, masks, tokens, F, c + 1 == C)
            state = take(state, s, factor, vs[c], V, F, c == 0)
        finish(state, rows, out, tokens, V, F)


@triton.jit
def online(
    sources,
    out,
    share,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """Keys pass in blocks of BLOCK_N under a running softmax."""
    q, _, _, rope, _, _, tokens = sources
    rows = indices(share * BLOCK_M, BLOCK_M, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
    own = (q_a, q_b, rows)
    state = fresh(BLOCK_M, V)
    state = pass_blocks(attend, state, own, sources, tokens, F, QK, V, BLOCK_N, TAIL, TAIL_FIRST)
    finish(state, rows, out, tokens, V, F)


@triton.jit
def attend(
    state,
    own,
    start,
    sources,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Take WIDTH keys from ``start`` on into the running softmax."""
    q_a, q_b, rows = own
    _, k, v, rope, masks, scale, tokens = sources
    keys = indices(start, WIDTH, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, EDGE)
    s = product(q_a, q_b, k_a, k_b, QK, F)
    s, factor = masked(s, rows[:, None], keys[None, :], scale, masks, tokens, F, EDGE)
    values = load_parts(v[0], keys, v[1], tokens, V, EDGE)
    return take(state, s, factor, values, V, F, False)


@triton.jit
def fresh(ROWS: tl.constexpr, V: tl.constexpr):
    """The running softmax of rows that have seen no key: the sum of weighted values, in both parts; the
    maximum, in units of log 2; the sum of the weights.
    """
    acc_a, acc_b = zeros(ROWS, V)
    return acc_a, acc_b, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def take(state, s, factor, values, V: tl.constexpr, F: tl.constexpr, FIRST: tl.constexpr):
    """Take logits and the values of their keys into the running softmax; the FIRST ones rescale nothing."""
    acc_a, acc_b, top, total = state
    new_top = tl.max(s, axis=1) * factor
    if not FIRST:
        new_top = tl.maximum(top, new_top)
    base = finite(new_top)
    weights = tl.exp2(s * factor - base[:, None])
    new_total = tl.sum(weights, axis=1)
    if not FIRST:
        fade = tl.exp2(top - base)
        new_total = total * fade + new_total
        acc_a *= fade[:, None]
        if V.b_width > 0:
            acc_b *= fade[:, None]
    acc_a, acc_b = accumulate(acc_a, acc_b, weights, values[0], values[1], V, F)
    return acc_a, acc_b, new_top, new_total
