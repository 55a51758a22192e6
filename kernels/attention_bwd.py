"""Attention backward in one launch: programs that own keys, and programs that own queries.

Every gradient is summed by the one program that owns it, in a fixed order: bit for bit the same each time,
without atomics and without scratch memory. What that costs is a second S = q k^T and dP = dO v^T, seven
products for the five that sharing would need; at a ViT's lengths the kernel waits for memory, and both
kinds of program of a head run side by side and read the same lines.
"""

import triton
import triton.language as tl

from .attention_fwd import INTEGERS as FWD_INTEGERS
from .attention_load import load_parts, prepare_backward, store_parts
from .attention_score import LOG2E, accumulate, head_start, indices, load_prepared, masked, product, zeros

INTEGERS = [*FWD_INTEGERS, "stride_grad_batch", "stride_grad_token", "stride_grad_channel", "key_programs"]


@triton.jit(do_not_specialize=INTEGERS)
def _attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dqkv_ptr,
    sums_ptr,
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
    stride_grad_batch,
    stride_grad_token,
    stride_grad_channel,
    prefix,
    tokens,
    heads,
    programs,
    key_programs,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    KEYS_N: tl.constexpr,
    KEYS_M: tl.constexpr,
    KEYS_TAIL: tl.constexpr,
    QUERIES_M: tl.constexpr,
    QUERIES_N: tl.constexpr,
    QUERIES_TAIL: tl.constexpr,
):
    """The first ``key_programs`` of a head's ``programs`` own KEYS_N keys each, the rest QUERIES_M queries.

    Strides of q, k, v and the rotary tables come in units of ALIGN elements, those of the output's gradient
    in GRAD_ALIGN; its channels lie side by side where their stride is None. ``sums_ptr`` [B * H * programs,
    2, d], if there is one, takes each program's share of the norm weights' gradients.
    """
    pid = tl.program_id(0)
    share = pid % programs
    head = pid // programs % heads
    batch = pid // programs // heads
    dim: tl.constexpr = V.dim
    stride_q, stride_k, stride_v = stride_q_token * ALIGN, stride_k_token * ALIGN, stride_v_token * ALIGN
    q_ptr = head_start(q_ptr, batch, head, stride_q_batch * ALIGN, stride_q_head * ALIGN)
    k_ptr = head_start(k_ptr, batch, head, stride_k_batch * ALIGN, stride_k_head * ALIGN)
    v_ptr = head_start(v_ptr, batch, head, stride_v_batch * ALIGN, stride_v_head * ALIGN)
    stride_out = heads * dim
    out_ptr += batch.to(tl.int64) * tokens * stride_out + head * dim
    dqkv_ptr += batch.to(tl.int64) * tokens * stride_out * 3 + head * dim
    lse_ptr += (batch.to(tl.int64) * heads + head) * tokens
    stride_grad = stride_grad_token * GRAD_ALIGN
    grad_ptr = head_start(grad_ptr, batch, head, stride_grad_batch * GRAD_ALIGN, 0)
    if stride_grad_channel is None:
        grad_ptr += head * dim
    else:
        grad_ptr += head.to(tl.int64) * dim * stride_grad_channel
    if F.rope != "":
        cos_ptr = head_start(cos_ptr, batch, head, stride_rope_batch * ALIGN, stride_rope_head * ALIGN)
        sin_ptr = head_start(sin_ptr, batch, head, stride_rope_batch * ALIGN, stride_rope_head * ALIGN)
    if F.mask != "":
        mask_ptr = head_start(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    if F.key_mask:
        key_mask_ptr = head_start(key_mask_ptr, batch, head, stride_key_batch, 0)
    if sums_ptr is not None:
        sums_ptr += pid.to(tl.int64) * 2 * dim

    q = (q_ptr, stride_q, (q_weight_ptr, q_bias_ptr, eps))
    k = (k_ptr, stride_k, (k_weight_ptr, k_bias_ptr, eps))
    v = (v_ptr, stride_v)
    out = (out_ptr, stride_out, grad_ptr, stride_grad, stride_grad_channel, lse_ptr)
    rope = (cos_ptr, sin_ptr, stride_rope_token * ALIGN, prefix, tokens)
    masks = (mask_ptr, stride_mask_query, stride_mask_key, key_mask_ptr, stride_key_token)
    grads = (dqkv_ptr, 3 * stride_out, sums_ptr)
    if share < key_programs:
        _own_keys(
            q,
            k,
            v,
            out,
            grads,
            rope,
            masks,
            scale,
            share,
            tokens,
            stride_out,
            F,
            QK,
            V,
            KEYS_N,
            KEYS_M,
            KEYS_TAIL,
        )
    else:
        share -= key_programs
        _own_queries(
            q,
            k,
            v,
            out,
            grads,
            rope,
            masks,
            scale,
            share,
            tokens,
            F,
            QK,
            V,
            QUERIES_M,
            QUERIES_N,
            QUERIES_TAIL,
        )


@triton.jit
def _own_keys(
    q,
    k,
    v,
    out,
    grads,
    rope,
    masks,
    scale,
    share,
    tokens,
    stride_part,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dk and dv of N keys: the queries pass in blocks of M, full but for a last one, TAIL wide."""
    keys = indices(share * N, N, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, True)
    v_a, v_b = load_parts(v[0], keys, v[1], tokens, V, True)
    dk_a, dk_b = zeros(N, QK)
    dv_a, dv_b = zeros(N, V)
    full = tokens // M * M
    for start in range(0, full, M):
        dk_a, dk_b, dv_a, dv_b = _pass_queries(
            dk_a,
            dk_b,
            dv_a,
            dv_b,
            k_a,
            k_b,
            v_a,
            v_b,
            keys,
            start,
            q,
            out,
            rope,
            masks,
            scale,
            tokens,
            F,
            QK,
            V,
            M,
            False,
        )
    if TAIL > 0:
        dk_a, dk_b, dv_a, dv_b = _pass_queries(
            dk_a,
            dk_b,
            dv_a,
            dv_b,
            k_a,
            k_b,
            v_a,
            v_b,
            keys,
            full,
            q,
            out,
            rope,
            masks,
            scale,
            tokens,
            F,
            QK,
            V,
            TAIL,
            True,
        )
    dqkv_ptr, stride, sums_ptr = grads
    store_parts(dqkv_ptr + 2 * stride_part, dv_a, dv_b, keys, stride, tokens, V)
    dk_a, dk_b = prepare_backward(
        dk_a * scale, dk_b * scale, k[0], keys, k[1], k[2], rope, sums_ptr, tokens, QK, F
    )
    store_parts(dqkv_ptr + stride_part, dk_a, dk_b, keys, stride, tokens, QK)


@triton.jit
def _pass_queries(
    dk_a,
    dk_b,
    dv_a,
    dv_b,
    k_a,
    k_b,
    v_a,
    v_b,
    keys,
    start,
    q,
    out,
    rope,
    masks,
    scale,
    tokens,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """What WIDTH queries add to dk and dv, in the transposed form, where only dS must change its layout."""
    rows = indices(start, WIDTH, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, EDGE)
    grad_a, grad_b, lse, delta = _load_outputs(out, rows, tokens, V, EDGE)
    s = product(k_a, k_b, q_a, q_b, QK, F)
    # Keys past the last are in rows of their own here, which are never stored.
    s, factor = masked(s, rows[None, :], keys[:, None], scale, masks, tokens, F, False)
    p = tl.exp2(s * factor - lse[None, :])
    dv_a, dv_b = accumulate(dv_a, dv_b, p, grad_a, grad_b, V, F)
    ds = p * (product(v_a, v_b, grad_a, grad_b, V, F) - delta[None, :])
    dk_a, dk_b = accumulate(dk_a, dk_b, ds, q_a, q_b, QK, F)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def _own_queries(
    q,
    k,
    v,
    out,
    grads,
    rope,
    masks,
    scale,
    share,
    tokens,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dq of M queries: the keys pass in blocks of N, full but for a last one, TAIL wide."""
    rows = indices(share * M, M, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
    grad_a, grad_b, lse, delta = _load_outputs(out, rows, tokens, V, True)
    dq_a, dq_b = zeros(M, QK)
    full = tokens // N * N
    for start in range(0, full, N):
        dq_a, dq_b = _pass_keys(
            dq_a,
            dq_b,
            q_a,
            q_b,
            grad_a,
            grad_b,
            lse,
            delta,
            rows,
            start,
            k,
            v,
            rope,
            masks,
            scale,
            tokens,
            F,
            QK,
            V,
            N,
            False,
        )
    if TAIL > 0:
        dq_a, dq_b = _pass_keys(
            dq_a,
            dq_b,
            q_a,
            q_b,
            grad_a,
            grad_b,
            lse,
            delta,
            rows,
            full,
            k,
            v,
            rope,
            masks,
            scale,
            tokens,
            F,
            QK,
            V,
            TAIL,
            True,
        )
    dqkv_ptr, stride, sums_ptr = grads
    dq_a, dq_b = prepare_backward(
        dq_a * scale, dq_b * scale, q[0], rows, q[1], q[2], rope, sums_ptr, tokens, QK, F
    )
    store_parts(dqkv_ptr, dq_a, dq_b, rows, stride, tokens, QK)


@triton.jit
def _pass_keys(
    dq_a,
    dq_b,
    q_a,
    q_b,
    grad_a,
    grad_b,
    lse,
    delta,
    rows,
    start,
    k,
    v,
    rope,
    masks,
    scale,
    tokens,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """What WIDTH keys add to dq. Keys past the last get no weight: exp(0 - lse) may be anything."""
    keys = indices(start, WIDTH, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, EDGE)
    v_a, v_b = load_parts(v[0], keys, v[1], tokens, V, EDGE)
    s = product(q_a, q_b, k_a, k_b, QK, F)
    s, factor = masked(s, rows[:, None], keys[None, :], scale, masks, tokens, F, EDGE)
    p = tl.exp2(s * factor - lse[:, None])
    ds = p * (product(grad_a, grad_b, v_a, v_b, V, F) - delta[:, None])
    return accumulate(dq_a, dq_b, ds, k_a, k_b, QK, F)


@triton.jit
def _load_outputs(out, rows, tokens, V: tl.constexpr, EDGE: tl.constexpr):
    """The output's gradient, the log-sum-exp in units of log 2, and delta = sum of output times gradient.

    The log-sum-exp of a row that saw no key, or is none, becomes inf: its weights exp(s - inf) are zero.
    """
    out_ptr, stride_out, grad_ptr, stride_grad, stride_lane, lse_ptr = out
    grad_a, grad_b = load_parts(grad_ptr, rows, stride_grad, tokens, V, EDGE, stride_lane)
    out_a, out_b = load_parts(out_ptr, rows, stride_out, tokens, V, EDGE)
    delta = tl.sum(out_a.to(tl.float32) * grad_a.to(tl.float32), axis=1)
    if V.b_width > 0:
        delta += tl.sum(out_b.to(tl.float32) * grad_b.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + rows, mask=rows < tokens, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return grad_a, grad_b, lse * LOG2E, delta
