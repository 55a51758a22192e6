"""Attention backward in one launch of five products: a program owns a whole head, of up to ``TOKENS`` tokens.

S = q k^T and dP = dO v^T are computed once, and dq, dk and dv are summed by the one program: no atomics, no
scratch memory, the same bits each time. The queries stay in shared memory, and chunks of keys pass over them.
Products are transposed (keys by queries, channels by queries), because Hopper's tensor cores want 64 rows:
64 keys by 32 queries then fit, and so does the dq of all queries, in registers beside a chunk's dk and dv.
Of more than 208 tokens only 8 warps have registers for it, which pass 128 keys over 64 queries. A few keys
behind full chunks, as of 257 tokens, would cost one more: they are a tail, whose products are not transposed.
"""

# ruff: noqa: RUF005  Triton compiles no (*tuple, more)
import triton
import triton.language as tl

from .attention_load import load_parts
from .attention_score import LOG2E, await_the_stream, head_start, indices

# What it is for: the dq of more tokens would not fit into the registers of eight warps.
TOKENS, HEAD_DIM = 272, 64
# Key chunks that fit into shared memory beside the queries where two programs share a multiprocessor.
AHEAD = tl.constexpr(3)

INTEGERS = [
    *("stride_q_batch", "stride_q_token", "stride_q_head", "stride_k_batch", "stride_k_token"),
    *("stride_k_head", "stride_v_batch", "stride_v_token", "stride_v_head", "stride_grad_batch"),
    *("stride_grad_token", "stride_grad_channel", "tokens", "heads", "present"),
]


@triton.jit(do_not_specialize=INTEGERS)
def _attention_bwd_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dqkv_ptr,
    scale,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    stride_grad_batch,
    stride_grad_token,
    stride_grad_channel,
    tokens,
    heads,
    present,
    F: tl.constexpr,
    V: tl.constexpr,
    EARLY: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dq, dk and dv of one head: BLOCKS are the widths of its query blocks, the last maybe narrower than the
    first; its keys pass in CHUNKS chunks, WIDTH wide, and behind them a tail, TAIL wide, if that is not 0.
    All bits of ``present`` are set.

    Strides of q, k and v come in units of ALIGN elements, those of the output's gradient in GRAD_ALIGN; its
    channels lie side by side where their stride is None.
    """
    await_the_stream(EARLY)
    pid = tl.program_id(0)
    head = pid % heads
    batch = pid // heads
    dim: tl.constexpr = V.dim
    stride_out = heads * dim
    stride_q, stride_k, stride_v = stride_q_token * ALIGN, stride_k_token * ALIGN, stride_v_token * ALIGN
    q_ptr = head_start(q_ptr, batch, head, stride_q_batch * ALIGN, stride_q_head * ALIGN)
    k_ptr = head_start(k_ptr, batch, head, stride_k_batch * ALIGN, stride_k_head * ALIGN)
    v_ptr = head_start(v_ptr, batch, head, stride_v_batch * ALIGN, stride_v_head * ALIGN)
    out_ptr += batch.to(tl.int64) * tokens * stride_out + head * dim
    dqkv_ptr += batch.to(tl.int64) * tokens * stride_out * 3 + head * dim
    lse_ptr += (batch.to(tl.int64) * heads + head) * tokens
    stride_grad = stride_grad_token * GRAD_ALIGN
    grad_ptr = head_start(grad_ptr, batch, head, stride_grad_batch * GRAD_ALIGN, 0)
    if stride_grad_channel is None:
        grad_ptr += head * dim
    else:
        grad_ptr += head.to(tl.int64) * dim * stride_grad_channel

    # All loads first, so that their latencies overlap.
    qs, grads, outs, dqs, ks, vs = (), (), (), (), (), ()
    EDGE: tl.constexpr = CHUNKS - (TAIL == 0)  # the chunk that may have keys past the last, if one may
    for j in tl.static_range(len(BLOCKS)):
        rows = indices(j * BLOCKS[0], BLOCKS[j], F)
        qs = qs + (_load(q_ptr, rows, stride_q, tokens, V, j + 1 == len(BLOCKS)),)
        grad = _load(grad_ptr, rows, stride_grad, tokens, V, j + 1 == len(BLOCKS), stride_grad_channel)
        grads = grads + (grad,)
        outs = outs + (_load(out_ptr, rows, stride_out, tokens, V, j + 1 == len(BLOCKS)),)
        dqs = dqs + (_zeros(dim, BLOCKS[j]),)
    for c in tl.static_range(min(CHUNKS, AHEAD)):
        keys = indices(c * WIDTH, WIDTH, F)
        ks = ks + (_load(k_ptr, keys, stride_k, tokens, V, c == EDGE),)
        vs = vs + (_load(v_ptr, keys, stride_v, tokens, V, c == EDGE),)
    stride = 3 * stride_out
    for j in tl.static_range(len(BLOCKS)):
        rows = indices(j * BLOCKS[0], BLOCKS[j], F)
        delta = tl.sum(outs[j].to(tl.float32) * grads[j].to(tl.float32), axis=1)
        # No weight exp(s - inf) for a row past the last.
        lse = tl.load(lse_ptr + rows, mask=rows < tokens, other=float("inf"))
        notes = _notes(dqkv_ptr, stride, rows)
        tl.store(notes, delta)
        tl.store(notes + 16, lse * LOG2E)
    tl.debug_barrier()

    for c in tl.static_range(CHUNKS):
        # Always true, which the compiler must not know: it would compute each tile's address once for all
        # chunks, and run out of registers to hold them.
        if present >> c & 1:
            keys = indices(c * WIDTH, WIDTH, F)
            if c < AHEAD:
                k, v = ks[c], vs[c]
            else:
                k = _load(k_ptr, keys, stride_k, tokens, V, c == EDGE)
                v = _load(v_ptr, keys, stride_v, tokens, V, c == EDGE)
            dqs, dk, dv = _pass_chunk(
                dqs, qs, grads, k, v, keys, dqkv_ptr, stride, scale, tokens, F, BLOCKS, c == EDGE
            )
            _store(dqkv_ptr + 2 * stride_out, dv, keys, stride, tokens, V, c == EDGE)
            _store(dqkv_ptr + stride_out, dk * scale, keys, stride, tokens, V, c == EDGE)

    if TAIL > 0:
        ends = indices(CHUNKS * WIDTH, TAIL, F)
        k_end = _load(k_ptr, ends, stride_k, tokens, V, True)
        v_end = _load(v_ptr, ends, stride_v, tokens, V, True)
        ps, dss = (), ()
        for j in tl.static_range(len(BLOCKS)):
            nothing = _zeros(BLOCKS[j], TAIL).to(k_end.dtype)
            ps, dss = ps + (nothing,), dss + (nothing,)
        if present >> CHUNKS & 1:
            ps, dss = _weigh_tail(qs, grads, k_end, v_end, ends, dqkv_ptr, stride, scale, tokens, F, BLOCKS)
        dqs, dk_end, dv_end = _pass_tail(dqs, qs, grads, k_end, ps, dss, present >> CHUNKS + 1, F, BLOCKS)
        _store(dqkv_ptr + 2 * stride_out, tl.trans(dv_end), ends, stride, tokens, V, True)
        _store(dqkv_ptr + stride_out, tl.trans(dk_end * scale), ends, stride, tokens, V, True)

    # Every thread has read its notes before dq is written over them.
    tl.debug_barrier()
    for j in tl.static_range(len(BLOCKS)):
        rows = indices(j * BLOCKS[0], BLOCKS[j], F)
        _store(dqkv_ptr, tl.trans(dqs[j] * scale), rows, stride, tokens, V, j + 1 == len(BLOCKS))


@triton.jit
def _pass_chunk(
    dqs,
    qs,
    grads,
    k,
    v,
    keys,
    dqkv_ptr,
    stride,
    scale,
    tokens,
    F: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """dq^T [d, queries] of each block with what a chunk of keys adds; the chunk's dk and dv [keys, d]."""
    dk = _zeros(k.shape[0], k.shape[1])
    dv = _zeros(k.shape[0], k.shape[1])
    added = ()
    for j in tl.static_range(len(BLOCKS)):
        # Written unlike the notes' first use, or the compiler would hold these pointers too.
        notes = _notes(dqkv_ptr + j * BLOCKS[0] // 16 * stride, stride, indices(0, BLOCKS[j], F))
        s = tl.dot(k, tl.trans(qs[j]), input_precision=F.precision)
        p = tl.exp2(s * (scale * LOG2E) - tl.load(notes + 16)[None, :])
        dp = tl.dot(v, tl.trans(grads[j]), input_precision=F.precision) - tl.load(notes)[None, :]
        if EDGE:
            # Keys past the last were read as zeros, and their weight exp(0 - lse) may be anything.
            p = tl.where((keys < tokens)[:, None], p, 0.0)
        ds = (p * dp).to(k.dtype)
        dv = tl.dot(p.to(k.dtype), grads[j], dv, input_precision=F.precision)
        dk = tl.dot(ds, qs[j], dk, input_precision=F.precision)
        added = added + (tl.dot(tl.trans(k), ds, dqs[j], input_precision=F.precision),)
    return added, dk, dv


@triton.jit
def _weigh_tail(
    qs, grads, k, v, keys, dqkv_ptr, stride, scale, tokens, F: tl.constexpr, BLOCKS: tl.constexpr
):
    """P and dS [queries, keys] of each block and a few keys, rounded.

    Not transposed: as columns the keys may be few, where as rows they would be padded to 64.
    """
    ps, dss = (), ()
    for j in tl.static_range(len(BLOCKS)):
        notes = _notes(dqkv_ptr + j * BLOCKS[0] // 16 * stride, stride, indices(0, BLOCKS[j], F))
        s = tl.dot(qs[j], tl.trans(k), input_precision=F.precision)
        p = tl.exp2(s * (scale * LOG2E) - tl.load(notes + 16)[:, None])
        p = tl.where((keys < tokens)[None, :], p, 0.0)
        dp = tl.dot(grads[j], tl.trans(v), input_precision=F.precision) - tl.load(notes)[:, None]
        ps = ps + (p.to(k.dtype),)
        dss = dss + ((p * dp).to(k.dtype),)
    return ps, dss


@triton.jit
def _pass_tail(dqs, qs, grads, k, ps, dss, present, F: tl.constexpr, BLOCKS: tl.constexpr):
    """dq^T [d, queries] of each block with what a few keys add; their dk^T and dv^T [d, keys].

    Branches, always taken as the chunks' are, part the blocks, and P and dS come from another: where a
    product of 64 rows leads to one more in the same branch, Triton has each four warps compute all of it.
    """
    dk = _zeros(k.shape[1], k.shape[0])
    dv = _zeros(k.shape[1], k.shape[0])
    added = ()
    for j in tl.static_range(len(BLOCKS)):
        dq = dqs[j]
        if present >> j & 1:
            dv = tl.dot(tl.trans(grads[j]), ps[j], dv, input_precision=F.precision)
            dk = tl.dot(tl.trans(qs[j]), dss[j], dk, input_precision=F.precision)
            dq = tl.dot(tl.trans(k), tl.trans(dss[j]), dq, input_precision=F.precision)
        added = added + (dq,)
    return added, dk, dv


@triton.jit
def _notes(dqkv_ptr, stride, rows):
    """Where delta is kept for each of these rows, and 16 floats on its log-sum-exp: in dq, stored last.

    Row i of dq, at least 32 floats long, keeps them for tokens 16 i to 16 i + 15.
    """
    floats = dqkv_ptr.to(tl.pointer_type(tl.float32))
    return floats + rows // 16 * (stride * dqkv_ptr.dtype.element_ty.primitive_bitwidth // 32) + rows % 16


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _load(ptr, rows, stride, tokens, V: tl.constexpr, EDGE: tl.constexpr, stride_lane=None):
    """Rows in one part; zeros past the last token (if EDGE)."""
    return load_parts(ptr, rows, stride, tokens, V, EDGE, stride_lane)[0]


@triton.jit
def _store(ptr, tile, rows, stride, tokens, V: tl.constexpr, EDGE: tl.constexpr):
    """Rows rounded to the type that ``ptr`` points to, but none past the last token (if EDGE)."""
    places = ptr + rows[:, None] * stride + tl.arange(0, V.dim)[None, :]
    if EDGE:
        tl.store(places, tile.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None])
    else:
        tl.store(places, tile.to(ptr.dtype.element_ty))
