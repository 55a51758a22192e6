"""Attention forward: exact softmax in one pass where a head's keys fit on the chip, online beyond."""

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
    """Keys and values are loaded once, in up to three chunks, and stay while the query blocks pass.

    All logits of a row are there at once, so the softmax takes one pass: nothing is rescaled.
    """
    q, k, v, rope, masks, scale, tokens = sources
    C: tl.constexpr = len(CHUNKS)
    keys_0 = indices(0, CHUNKS[0], F)
    k0_a, k0_b = load_prepared(k, keys_0, rope, tokens, F, QK, C == 1)
    v0_a, v0_b = load_parts(v[0], keys_0, v[1], tokens, V, C == 1)
    if C > 1:
        keys_1 = indices(CHUNKS[0], CHUNKS[1], F)
        k1_a, k1_b = load_prepared(k, keys_1, rope, tokens, F, QK, C == 2)
        v1_a, v1_b = load_parts(v[0], keys_1, v[1], tokens, V, C == 2)
    if C > 2:
        keys_2 = indices(CHUNKS[0] + CHUNKS[1], CHUNKS[2], F)
        k2_a, k2_b = load_prepared(k, keys_2, rope, tokens, F, QK, True)
        v2_a, v2_b = load_parts(v[0], keys_2, v[1], tokens, V, True)

    for start in range(share * BLOCK_M, tokens, programs * BLOCK_M):
        rows = indices(start, BLOCK_M, F)
        queries = rows[:, None]
        q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
        s0 = product(q_a, q_b, k0_a, k0_b, QK, F)
        s0, factor = masked(s0, queries, keys_0[None, :], scale, masks, tokens, F, C == 1)
        top = tl.max(s0, axis=1)
        if C > 1:
            s1 = product(q_a, q_b, k1_a, k1_b, QK, F)
            s1, factor = masked(s1, queries, keys_1[None, :], scale, masks, tokens, F, C == 2)
            top = tl.maximum(top, tl.max(s1, axis=1))
        if C > 2:
            s2 = product(q_a, q_b, k2_a, k2_b, QK, F)
            s2, factor = masked(s2, queries, keys_2[None, :], scale, masks, tokens, F, True)
            top = tl.maximum(top, tl.max(s2, axis=1))
        top *= factor
        base = finite(top)
        acc_a, acc_b = zeros(BLOCK_M, V)
        weights = tl.exp2(s0 * factor - base[:, None])
        total = tl.sum(weights, axis=1)
        acc_a, acc_b = accumulate(acc_a, acc_b, weights, v0_a, v0_b, V, F)
        if C > 1:
            weights_1 = tl.exp2(s1 * factor - base[:, None])
            total += tl.sum(weights_1, axis=1)
            acc_a, acc_b = accumulate(acc_a, acc_b, weights_1, v1_a, v1_b, V, F)
        if C > 2:
            weights_2 = tl.exp2(s2 * factor - base[:, None])
            total += tl.sum(weights_2, axis=1)
            acc_a, acc_b = accumulate(acc_a, acc_b, weights_2, v2_a, v2_b, V, F)
        finish(acc_a, acc_b, top, total, rows, out, tokens, V, F)


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
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_a, acc_b = zeros(BLOCK_M, V)
    own, state = (q_a, q_b, rows), (acc_a, acc_b, top, total)
    state = pass_blocks(attend, state, own, sources, tokens, F, QK, V, BLOCK_N, TAIL, TAIL_FIRST)
    acc_a, acc_b, top, total = state
    finish(acc_a, acc_b, top, total, rows, out, tokens, V, F)


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
    acc_a, acc_b, top, total = state
    q_a, q_b, rows = own
    _, k, v, rope, masks, scale, tokens = sources
    keys = indices(start, WIDTH, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, EDGE)
    s = product(q_a, q_b, k_a, k_b, QK, F)
    s, factor = masked(s, rows[:, None], keys[None, :], scale, masks, tokens, F, EDGE)
    v_a, v_b = load_parts(v[0], keys, v[1], tokens, V, EDGE)
    new_top = tl.maximum(top, tl.max(s, axis=1) * factor)
    base = finite(new_top)
    weights = tl.exp2(s * factor - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, axis=1)
    acc_a *= fade[:, None]
    if V.b_width > 0:
        acc_b *= fade[:, None]
    acc_a, acc_b = accumulate(acc_a, acc_b, weights, v_a, v_b, V, F)
    return acc_a, acc_b, new_top, total
