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
    pass_blocks,
    product,
    store_facts,
    weights_of,
    zeros,
)


@triton.jit
def own_queries(
    sources,
    out,
    grads,
    share,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """dq of M queries: the keys pass in blocks of N."""
    q, _, _, grad, facts_ptr, rope, _, scale, tokens = sources
    rows = indices(share * M, M, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, True)
    grad_a, grad_b, base, lse, delta = load_outputs(out, grad, rows, tokens, V, F)
    store_facts(facts_ptr, base, lse, delta, rows, tokens)
    own = (q_a, q_b, grad_a, grad_b, base, lse, delta, rows)
    dq_a, dq_b = pass_blocks(pass_keys, zeros(M, QK), own, sources, tokens, F, QK, V, N, TAIL, TAIL_FIRST)
    dqkv_ptr, stride_part, sums_ptr = grads
    dq_a, dq_b = prepare_backward(
        dq_a * scale, dq_b * scale, q[0], rows, q[1], q[2], rope, sums_ptr, tokens, QK, F
    )
    store_parts(dqkv_ptr, dq_a, dq_b, rows, 3 * stride_part, tokens, QK)


@triton.jit
def pass_keys(
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
    """What WIDTH keys add to dq. Keys past the last get no weight: exp(0 - lse) may be anything."""
    dq_a, dq_b = state
    q_a, q_b, grad_a, grad_b, base, lse, delta, rows = own
    _, k, v, _, _, rope, masks, scale, tokens = sources
    keys = indices(start, WIDTH, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, EDGE)
    v_a, v_b = load_parts(v[0], keys, v[1], tokens, V, EDGE)
    s = product(q_a, q_b, k_a, k_b, QK, F)
    s, factor = masked(s, rows[:, None], keys[None, :], scale, masks, tokens, F, EDGE)
    p = weights_of(s, factor, base[:, None], lse[:, None], F)
    ds = p * (product(grad_a, grad_b, v_a, v_b, V, F) - delta[:, None])
    return accumulate(dq_a, dq_b, ds, k_a, k_b, QK, F)
