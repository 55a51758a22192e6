"""What both directions are told alike, as launch arguments: layouts, masks, norms, rotary tables."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_load import Form, parts_of
from .launch import INT32_MAX, begins_early, vector_width

MAX_HEAD_DIM = 256
# Sizes and strides: Triton would compile a variant for each kind of value, which gains nothing here.
INTEGERS = [
    *(
        "stride_q_batch",
        "stride_q_token",
        "stride_q_head",
        "stride_k_batch",
        "stride_k_token",
        "stride_k_head",
    ),
    *("stride_v_batch", "stride_v_token", "stride_v_head", "stride_mask_batch", "stride_mask_head"),
    *("stride_mask_query", "stride_mask_key", "stride_key_batch", "stride_key_token", "stride_rope_batch"),
    *("stride_rope_head", "stride_rope_token", "prefix", "tokens", "heads", "programs"),
]


class Options(NamedTuple):
    """Everything that attention takes beside q, k and v; see ``attention_fwd``."""

    scale: float
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    qk_norm: str | None = None
    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None
    qk_norm_eps: float = 1e-6
    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    rope_layout: str = "half"
    num_prefix_tokens: int = 0
    precision: str = "ieee"

    @property
    def layout(self) -> str:
        """The rotary layout, "" where nothing is rotated."""
        return self.rope_layout if self.rope_cos is not None else ""


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, options: Options, arch: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run-time arguments and the constants that forward and backward have in common.

    Raises:
        ValueError: for a head wider than ``MAX_HEAD_DIM`` channels, or channels that are not contiguous.
    """
    batch, tokens, heads, dim = q.shape
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"attention: the kernels take up to {MAX_HEAD_DIM} channels a head, not {dim}")
    if any(t.stride(-1) != 1 and dim > 1 for t in (q, k, v)):
        raise ValueError("attention: the channels of q, k and v must be contiguous; copy the tensor first")
    mask, mask_kind = _mask(options.attn_mask, (batch, heads, tokens, tokens))
    key_mask = None if options.key_mask is None else options.key_mask.view(torch.uint8)
    cos, sin = _tables(
        options.rope_cos, options.rope_sin, (batch, heads, tokens - options.num_prefix_tokens, dim)
    )
    args = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask, "key_mask_ptr": key_mask}
    for name in ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"):
        vector = getattr(options, name)
        args[f"{name.replace('norm_', '')}_ptr"] = None if vector is None else vector.contiguous()
    args |= {"cos_ptr": cos, "sin_ptr": sin, "scale": float(options.scale), "eps": float(options.qk_norm_eps)}
    align = vector_width(q, k, v, cos)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= _strides(name, tensor, "batch", "token", "head", unit=align)
    args |= _strides("mask", mask, "batch", "head", "query", "key")
    args |= _strides("key", key_mask, "batch", "token")
    # None tells the compiler that elements lie side by side, as they do in all but an odd mask.
    args |= {name: None for name in ("stride_mask_key", "stride_key_token") if args[name] == 1}
    args |= _strides("rope", cos, "batch", "head", "token", unit=align)
    args |= {"prefix": options.num_prefix_tokens, "tokens": tokens, "heads": heads}
    steps = [t.stride(1) for t in (q, k, v)] + ([] if mask is None else [mask.stride(2)])
    far = max(steps) * tokens > INT32_MAX
    form = Form(
        options.qk_norm or "",
        options.layout,
        mask_kind,
        key_mask is not None,
        options.precision,
        far,
    )
    constants = {"F": form, "QK": parts_of(dim, options.layout), "V": parts_of(dim), "ALIGN": align}
    return args, constants | {"EARLY": begins_early(arch)}


@cache
def tail_of(tokens: int, block: int) -> int:
    """How wide a last block must be behind full ones: 0, 16, 32, ... ``block``."""
    rest = tokens % block
    return next(width for width in (0, 16, 32, 64, 128, 256) if width >= rest)


def _strides(name: str, tensor: Tensor | None, *dims: str, unit: int = 1) -> dict[str, int]:
    strides = (0,) * len(dims) if tensor is None else tensor.stride()[: len(dims)]
    return {f"stride_{name}_{dim}": stride // unit for dim, stride in zip(dims, strides, strict=True)}


def _mask(mask: Tensor | None, full: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """The mask at its full size, without a copy, and its kind: "", "bool" or "bias"."""
    if mask is None:
        return None, ""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8).expand(full), "bool"
    return mask.expand(full), "bias"


def _tables(
    cos: Tensor | None, sin: Tensor | None, full: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Both tables at their full size and of one layout: small ones that differ are copied."""
    if cos is None:
        return None, None
    cos, sin = torch.broadcast_tensors(cos, sin) if cos.shape != sin.shape else (cos, sin)
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos.expand(full), sin.expand(full)
