"""attention: the launchers of the Triton kernels, forward and backward."""

from functools import cache
from itertools import combinations_with_replacement, zip_longest
from typing import Any

import torch
from torch import Tensor

from .attention_bwd import _attention_bwd_kernel
from .attention_bwd_heads import HEAD_DIM, TOKENS, _attention_bwd_heads_kernel
from .attention_fwd import _attention_fwd_kernel
from .attention_options import Options, shared_arguments, tail_of
from .launch import Launch, arch_of, needs_int64, vector_width
from .launch_cache import run
from .tiles import MULTIPROCESSORS, Tile, dtype_class, tile

# What a program owns in each of the backward's launches, in their order.
OWNERS = ("queries", "keys")


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool = False, **options
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + masks) v for every head, q and k normalised and rotated first if asked.

    Args:
        q, k, v: [B, N, H, d], float32, float16 or bfloat16, d up to 256, with any strides but a last of 1.
        with_lse: also return the logits' log-sum-exp, which the backward needs.
        options: ``scale`` (above 0), ``attn_mask`` (bool or floating, up to [B, H, N, N]), ``key_mask`` (bool
            [B, N]), ``qk_norm`` ("layer_norm", "rms_norm" or None) with its weights [d] and ``qk_norm_eps``,
            ``rope_cos`` and ``rope_sin`` (up to [B, H, N - P, d]) with ``rope_layout`` ("half",
            "interleaved") and ``num_prefix_tokens``, ``precision`` of float32 products ("ieee", "tf32").

    Returns:
        [B, N, H * d], contiguous, in q's dtype; and [B, H, N] in float32, or [0] without ``with_lse``.

    Source: arXiv 1706.03762; the running softmax arXiv 1805.02867 and 2205.14135.
    """
    batch, tokens, heads, dim = q.shape
    out = torch.empty((batch, tokens, heads * dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if with_lse else 0, dtype=torch.float32, device=q.device)
    run(plan_fwd, q, k, v, out, lse if with_lse else None, Options(**options), arch_of(q.device))
    return out, lse


def attention_packed(qkv: Tensor, num_heads: int, options: Options) -> Tensor:
    """``attention_fwd`` of qkv [B, N, 3 * H * d], in the order (3, H, d), for inference: [B, N, H * d]."""
    batch, tokens, width = qkv.shape
    out = torch.empty((batch, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    run(plan_packed, qkv, num_heads, out, options, arch_of(qkv.device))
    return out


def plan_packed(qkv: Tensor, num_heads: int, out: Tensor, options: Options, arch: str) -> Launch:
    """The launch of ``attention_packed``; qkv is read where it lies, so its channels must be contiguous."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).unbind(2)
    return plan_fwd(q, k, v, out, None, options, arch)


def plan_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, options: Options, arch: str
) -> Launch:
    """The launch of the forward on an architecture, from shapes alone."""
    batch, tokens, heads, _ = q.shape
    chosen, options = _choose("attention_fwd", q, options, arch)
    args, constants = shared_arguments(q, k, v, options, arch)
    shape = dict(chosen.constants)
    side_by_side = shape.pop("RESIDENT") * MULTIPROCESSORS.get(arch, 1)
    chunks = chunks_of(tokens) if side_by_side else ()
    programs = -(-tokens // shape["BLOCK_M"])
    if chunks:
        programs = programs_of(batch * heads, programs, side_by_side)
    args |= {"out_ptr": out, "lse_ptr": lse, "programs": programs}
    constants |= shape | {"CHUNKS": chunks, "TAIL": 0 if chunks else tail_of(tokens, shape["BLOCK_N"])}
    grid = (batch * heads * programs,)
    return Launch(_attention_fwd_kernel, grid, args, constants, chosen.num_warps, chosen.num_stages)


@cache
def programs_of(heads: int, blocks: int, side_by_side: int) -> int:
    """How many programs share a head's query blocks, so that all heads are done first.

    They run in waves, ``side_by_side`` at a time. Each loads its head's keys, which takes about as long as
    half a block.
    """

    def time(programs: int) -> float:
        return -(-heads * programs // side_by_side) * (-(-blocks // programs) + 0.5)

    return min(range(1, blocks + 1), key=time)


@cache
def chunks_of(tokens: int) -> tuple[int, ...]:
    """Up to three powers of two that cover the tokens with least to spare, the widest first.

    197 = 128 + 64 + 16 with 11 to spare; one tile of 256 would leave 59 and spill. But 256 = 128 + 64 + 64: a
    second chunk of 128 takes 50 registers more, and a multiprocessor then holds two programs for three.
    """
    widths = (128, 64, 32, 16)
    covers = [
        cover
        for count in (1, 2, 3)
        for cover in combinations_with_replacement(widths, count)
        if sum(cover) >= tokens
    ]
    return min(covers, key=lambda cover: (sum(cover), cover.count(128) > 1, len(cover)))


def attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    norm_grads: bool = False,
    **options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``attention_fwd``, bit for bit the same in every run.

    Args:
        grad_out: [B, N, H * d] in q's dtype, any strides.
        q, k, v, options: as given to the forward.
        out, lse: what it returned.
        norm_grads: whether the gradients of the norms' weights and biases are wanted.

    Returns:
        [B, N, 3, H, d], contiguous, in q's dtype; then of q_norm_weight, q_norm_bias, k_norm_weight and
        k_norm_bias [d] in float32, or None for each without ``norm_grads``. Those of masks and rotary tables
        are not computed here.
    """
    batch, tokens, heads, dim = q.shape
    dqkv = torch.empty((batch, tokens, 3, heads, dim), dtype=q.dtype, device=q.device)
    chosen = Options(**options)
    facts = None
    if not _one_launch(q, chosen, arch_of(q.device)):
        facts = torch.empty((batch, heads, tokens, 4), dtype=torch.float32, device=q.device)
    sums = norm_sums(q, chosen, arch_of(q.device)) if norm_grads else ()
    run(plan_bwd, grad_out, q, k, v, out, lse, dqkv, facts, sums, chosen, arch_of(q.device))
    if not sums:
        return dqkv, None, None, None, None
    of_q, of_k = [share.sum(0) for share in sums]
    return dqkv, *of_q, *of_k


def norm_sums(q: Tensor, options: Options, arch: str) -> tuple[Tensor, ...]:
    """Where the programs of each of the backward's launches leave their shares of the norms' gradients."""
    batch, tokens, heads, dim = q.shape
    found = []
    for owner in OWNERS:
        own, _ = _sides(owner, _choose(f"attention_bwd_{owner}", q, options, arch)[0])
        programs = batch * heads * -(-tokens // own)
        found.append(torch.empty((programs, 2, dim), dtype=torch.float32, device=q.device))
    return tuple(found)


def plan_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    facts: Tensor | None,
    sums: tuple[Tensor, ...],
    options: Options,
    arch: str,
) -> tuple[Launch, ...]:
    """The launches of the backward on an architecture, in their order, from shapes alone.

    ``facts`` [B, H, N, 4] in float32 is scratch memory, which a backward in one launch does without; ``sums``
    is ``norm_sums``'s, or empty.
    """
    args, constants = shared_arguments(q, k, v, options, arch)
    side_by_side = grad_out.stride(-1) == 1
    align = vector_width(grad_out) if side_by_side else 1
    args |= {"out_ptr": out, "lse_ptr": lse, "grad_ptr": grad_out, "facts_ptr": facts, "dqkv_ptr": dqkv}
    args |= {
        "stride_grad_batch": grad_out.stride(0) // align,
        "stride_grad_token": grad_out.stride(1) // align,
    }
    args["stride_grad_channel"] = None if side_by_side else grad_out.stride(2)
    far = constants["F"].int64 or needs_int64(grad_out[:1], dqkv[:1])
    constants |= {"GRAD_ALIGN": align, "F": constants["F"]._replace(int64=far)}
    if heads := _one_launch(q, options, arch):
        return (_plan_heads(q, args, constants, heads),)
    return tuple(
        [
            _plan_owner(owner, q, args | {"sums_ptr": share}, constants, options, arch)
            for owner, share in zip_longest(OWNERS, sums)
        ]
    )


def _one_launch(q: Tensor, options: Options, arch: str) -> Tile | None:
    """The tile of the backward in one launch, or None where it takes two."""
    chosen, _ = _choose("attention_bwd_heads", q, options, arch)
    fits = 0 < q.shape[1] <= TOKENS and q.shape[3] == HEAD_DIM and not _has_load_stage(options)
    return chosen if chosen.constants["ONE_LAUNCH"] and fits else None


def _plan_heads(q: Tensor, args: dict[str, Any], constants: dict[str, Any], chosen: Tile) -> Launch:
    """The backward in one launch, whose programs own a head each."""
    batch, tokens, heads, _ = q.shape
    block, width = chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"]
    last = tail_of(tokens, block)
    blocks = (block,) * (tokens // block) + ((last,) if last else ())
    # Of 16 keys as columns: the queries are the rows then, and tensor cores want 64.
    tail = 16 if block >= 64 and tail_of(tokens, width) == 16 else 0
    chunks = tokens // width if tail else -(-tokens // width)
    args = args | {"present": -1}
    constants = constants | {"BLOCKS": blocks, "CHUNKS": chunks, "WIDTH": width, "TAIL": tail}
    names = _attention_bwd_heads_kernel.arg_names
    args, constants = ({name: given[name] for name in names if name in given} for given in (args, constants))
    return Launch(
        _attention_bwd_heads_kernel, (batch * heads,), args, constants, chosen.num_warps, chosen.num_stages
    )


def _plan_owner(
    owner: str,
    q: Tensor,
    args: dict[str, Any],
    constants: dict[str, Any],
    options: Options,
    arch: str,
) -> Launch:
    """The backward's launch whose programs own keys or queries."""
    batch, tokens, heads, _ = q.shape
    chosen, options = _choose(f"attention_bwd_{owner}", q, options, arch)
    own, passing = _sides(owner, chosen)
    programs = -(-tokens // own)
    form = constants["F"]._replace(precision=options.precision)
    constants = constants | chosen.constants | {"F": form, "OWNER": owner, "TAIL": tail_of(tokens, passing)}
    args["programs"] = programs
    grid = (batch * heads * programs,)
    return Launch(_attention_bwd_kernel, grid, args, constants, chosen.num_warps, chosen.num_stages)


def _sides(owner: str, chosen: Tile) -> tuple[int, int]:
    """How many keys or queries a program of the backward owns, and how many of the others pass at a time."""
    queries, keys = chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"]
    return (keys, queries) if owner == "keys" else (queries, keys)


def _choose(kernel: str, q: Tensor, options: Options, arch: str) -> tuple[Tile, Options]:
    """The tile, and the options with "ieee" for "tf32" where no tf32 tile would keep its registers.

    ``load`` is 1 where masks, norms or rotations take registers of their own.
    """
    sizes = {"head_dim": q.shape[3], "tokens": q.shape[1], "load": int(_has_load_stage(options))}
    wanted = dtype_class(q.dtype, options.precision)
    try:
        return tile(kernel, arch, wanted, **sizes), options
    except LookupError:
        if wanted != "tf32":
            raise
        return tile(kernel, arch, "ieee", **sizes), options._replace(precision="ieee")


def _has_load_stage(options: Options) -> bool:
    extras = (options.attn_mask, options.key_mask, options.qk_norm, options.rope_cos)
    return any(extra is not None for extra in extras)
