"""Attention backward in two launches of one kernel: first its programs own queries, then keys.

Every gradient is summed by the one program that owns it, in a fixed order: bit for bit the same each time,
without atomics. What that costs is a second S = q k^T and dP = dO v^T, seven products for the five that
sharing would need. Compiled apart, programs that own queries take half the registers of those that own keys,
so that more of them run at a time; and they leave each query's log-sum-exp and delta for the others, which
then need not read the output.
"""

import triton
import triton.language as tl

from .attention_bwd_keys import own_keys
from .attention_bwd_queries import own_queries
from .attention_options import INTEGERS as FWD_INTEGERS
from .attention_score import await_the_stream, head_start

INTEGERS = [*FWD_INTEGERS, "stride_grad_batch", "stride_grad_token", "stride_grad_channel"]


def _name(specialization) -> str:
    """What profilers call a launch."""
    return f"_attention_bwd_{specialization.constants['OWNER']}_kernel"


@triton.jit(do_not_specialize=INTEGERS, repr=_name)
def _attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    facts_ptr,
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
    F: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    EARLY: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    OWNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
):
    """Each of a head's ``programs`` owns BLOCK_N keys (OWNER "keys") or BLOCK_M queries ("queries").

    Strides of q, k, v and the rotary tables come in units of ALIGN elements, those of the output's gradient
    in GRAD_ALIGN; its channels lie side by side where their stride is None. ``facts_ptr`` [B, H, N, 4] goes
    from the queries' launch to the keys'. ``sums_ptr`` [B * H * programs,
    2, d], if there is one, takes each program's share of the norm's weight and bias gradients.
    """
    await_the_stream(EARLY)
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
    facts_ptr += (batch.to(tl.int64) * heads + head) * tokens * 4
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
    grad = (grad_ptr, stride_grad, stride_grad_channel)
    rope = (cos_ptr, sin_ptr, stride_rope_token * ALIGN, prefix, tokens)
    masks = (mask_ptr, stride_mask_query, stride_mask_key, key_mask_ptr, stride_key_token)
    sources = (q, k, v, grad, facts_ptr, rope, masks, scale, tokens)
    grads = (dqkv_ptr, stride_out, sums_ptr)
    if OWNER == "keys":
        own_keys(sources, grads, share, F, QK, V, BLOCK_N, BLOCK_M, TAIL, TAIL_FIRST)
    else:
        out = (out_ptr, stride_out, lse_ptr)
        own_queries(sources, out, grads, share, F, QK, V, BLOCK_M, BLOCK_N, TAIL, TAIL_FIRST)
