"""The programs of attention's backward that own queries: dq, and what the others want of each query."""

import triton
import triton.language as tl

from .attention_load import load_parts, prepare_backward, store_parts
from .attention_score import (
    accumulate,
    indices,
    load_outputs,
    load_prepared,
    masked,
    product,
    store_facts,
    weights_of,
    zeros,
)


@triton.jit
def own_queries(
    q,
    k,
    v,
    out,
    facts_ptr,
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
    TAIL_FIRST: tl.constexpr,
):
    """dq of M queries: the keys pass in blocks of N, full but for a last one, TAIL wide."""
    rows = indices(share * M, M, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
    grad_a, grad_b, base, lse, delta = load_outputs(out, rows, tokens, V, F)
    store_facts(facts_ptr, base, lse, delta, rows, tokens)
    dq_a, dq_b = zeros(M, QK)
    full = tokens // N * N
    for part in tl.static_range(2):
        if part == (0 if TAIL_FIRST else 1):
            if TAIL > 0:
                dq_a, dq_b = _pass_keys(
                    dq_a,
                    dq_b,
                    q_a,
                    q_b,
                    grad_a,
                    grad_b,
                    base,
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
        else:
            for start in range(0, full, N):
                dq_a, dq_b = _pass_keys(
                    dq_a,
                    dq_b,
                    q_a,
                    q_b,
                    grad_a,
                    grad_b,
                    base,
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
    base,
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
    p = weights_of(s, factor, base[:, None], lse[:, None], F)
    ds = p * (product(grad_a, grad_b, v_a, v_b, V, F) - delta[:, None])
    return accumulate(dq_a, dq_b, ds, k_a, k_b, QK, F)
