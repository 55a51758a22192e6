"""The programs of attention's backward that own keys: dk and dv."""

import triton
import triton.language as tl

from .attention_load import load_parts, prepare_backward, store_parts
from .attention_score import (
    accumulate,
    indices,
    load_facts,
    load_prepared,
    masked,
    pass_blocks,
    product,
    weights_of,
    zeros,
)


@triton.jit
def own_keys(
    sources,
    grads,
    share,
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """dk and dv of N keys: the queries pass in blocks of M."""
    _, k, v, _, _, rope, _, scale, tokens = sources
    keys = indices(share * N, N, F)
    k_a, k_b = load_prepared(k, keys, rope, tokens, F, QK, True)
    v_a, v_b = load_parts(v[0], keys, v[1], tokens, V, True)
    dk_a, dk_b = zeros(N, QK)
    dv_a, dv_b = zeros(N, V)
    own, state = (k_a, k_b, v_a, v_b, keys), (dk_a, dk_b, dv_a, dv_b)
    state = pass_blocks(pass_queries, state, own, sources, tokens, F, QK, V, M, TAIL, TAIL_FIRST)
    dk_a, dk_b, dv_a, dv_b = state
    dqkv_ptr, stride_part, sums_ptr = grads
    store_parts(dqkv_ptr + 2 * stride_part, dv_a, dv_b, keys, 3 * stride_part, tokens, V)
    dk_a, dk_b = prepare_backward(
        dk_a * scale, dk_b * scale, k[0], keys, k[1], k[2], rope, sums_ptr, tokens, QK, F
    )
    store_parts(dqkv_ptr + stride_part, dk_a, dk_b, keys, 3 * stride_part, tokens, QK)


@triton.jit
def pass_queries(
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
    """What WIDTH queries add to dk and dv, in the transposed form, where only dS must change its layout."""
    dk_a, dk_b, dv_a, dv_b = state
    k_a, k_b, v_a, v_b, keys = own
    q, _, _, grad, facts_ptr, rope, masks, scale, tokens = sources
    rows = indices(start, WIDTH, F)
    q_a, q_b = load_prepared(q, rows, rope, tokens, F, QK, EDGE)
    grad_a, grad_b = load_parts(grad[0], rows, grad[1], tokens, V, EDGE, grad[2])
    base, lse, delta = load_facts(facts_ptr, rows, tokens, F, EDGE)
    s = product(k_a, k_b, q_a, q_b, QK, F)
    # Keys past the last are in rows of their own here, which are never stored.
    s, factor = masked(s, rows[None, :], keys[:, None], scale, masks, tokens, F, False)
    p = weights_of(s, factor, base[None, :], lse[None, :], F)
    dv_a, dv_b = accumulate(dv_a, dv_b, p, grad_a, grad_b, V, F)
    ds = p * (product(v_a, v_b, grad_a, grad_b, V, F) - delta[None, :])
    dk_a, dk_b = accumulate(dk_a, dk_b, ds, q_a, q_b, QK, F)
    return dk_a, dk_b, dv_a, dv_b
