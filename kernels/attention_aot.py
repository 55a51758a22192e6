"""attention's launches for the ahead-of-time compiler: every entry of the tables, options pairwise."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import attention
from .attention_options import Options
from .launch import Launch

BATCH, HEADS = 64, 12

# Kernel, dtype class, tokens, head dim, options. Every entry of the tables, every head dim that is split, and
# every option of the load stage with every other. Dropped: their product; in the backward also rotary
# positions beside a mask, which no ViT has.
CASES = (
    ("fwd", "half", 50, 64, ""),
    ("fwd", "half", 197, 64, "lse"),
    ("fwd", "half", 256, 64, "lse"),
    ("fwd", "half", 257, 64, ""),
    ("fwd", "half", 577, 64, "lse"),
    ("fwd", "half", 1370, 64, "half layer_norm keys lse"),
    ("fwd", "half", 201, 64, "half bias"),
    ("fwd", "half", 577, 48, "layer_norm bias keys"),
    ("fwd", "half", 577, 128, ""),
    ("fwd", "half", 257, 80, "half rms_norm lse"),
    ("fwd", "half", 197, 96, "layer_norm bool keys"),
    ("fwd", "half", 257, 128, "interleaved"),
    ("fwd", "half", 577, 72, "lse"),
    ("fwd", "half", 577, 256, "lse"),
    ("fwd", "tf32", 577, 64, "half layer_norm lse"),
    ("fwd", "tf32", 257, 128, ""),
    ("fwd", "tf32", 257, 128, "rms_norm bias"),
    ("fwd", "ieee", 197, 64, "lse"),
    ("bwd", "half", 50, 64, ""),
    ("bwd", "half", 197, 64, ""),
    ("bwd", "half", 224, 64, ""),
    ("bwd", "half", 257, 64, ""),
    ("bwd", "half", 577, 64, ""),
    ("bwd", "half", 1370, 64, "half layer_norm keys"),
    ("bwd", "half", 577, 64, "bias"),
    ("bwd", "half", 201, 64, "interleaved"),
    ("bwd", "half", 577, 48, "rms_norm bool keys"),
    ("bwd", "half", 577, 128, ""),
    ("bwd", "half", 257, 80, ""),
    ("bwd", "half", 197, 96, ""),
    ("bwd", "tf32", 577, 64, ""),
    ("bwd", "ieee", 197, 64, ""),
)


def aot_launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """Label and launch of everything that is shipped for an architecture, planned on meta tensors."""
    for kernel, dtype, tokens, dim, words in CASES:
        for launch in _launches(arch, kernel, dtype, tokens, dim, words.split()):
            owner = launch.constants.get("OWNER")
            yield f"{dtype} N={tokens} d={dim} {words}".strip() + (f", own {owner}" if owner else ""), launch


def _launches(
    arch: str, kernel: str, dtype_class: str, tokens: int, dim: int, words: list[str]
) -> tuple[Launch, ...]:
    dtype = torch.bfloat16 if dtype_class == "half" else torch.float32
    qkv = _meta(BATCH, tokens, 3, HEADS, dim, dtype=dtype)
    out, lse = _meta(BATCH, tokens, HEADS * dim, dtype=dtype), _meta(BATCH, HEADS, tokens)
    options = _options(tokens, dim, dtype, words)
    options = options._replace(precision="tf32" if dtype_class == "tf32" else "ieee")
    if kernel == "fwd":
        return (attention.plan_fwd(*qkv.unbind(2), out, lse if "lse" in words else None, options, arch),)
    sums = attention.norm_sums(qkv[:, :, 0], options, arch) if options.qk_norm else ()
    facts = _meta(BATCH, HEADS, tokens, 4)
    return attention.plan_bwd(out, *qkv.unbind(2), out, lse, qkv, facts, sums, options, arch)


def _options(tokens: int, dim: int, dtype: torch.dtype, words: list[str]) -> Options:
    options = Options(scale=dim**-0.5)
    if layout := next((word for word in words if word in ("half", "interleaved")), ""):
        table = _meta(tokens - 1, dim)
        options = options._replace(rope_cos=table, rope_sin=table, rope_layout=layout, num_prefix_tokens=1)
    if norm := next((word for word in words if word in ("layer_norm", "rms_norm")), ""):
        options = options._replace(
            qk_norm=norm, q_norm_weight=_meta(dim, dtype=dtype), k_norm_weight=_meta(dim, dtype=dtype)
        )
    if norm == "layer_norm":
        options = options._replace(q_norm_bias=_meta(dim, dtype=dtype), k_norm_bias=_meta(dim, dtype=dtype))
    if "bias" in words or "bool" in words:
        options = options._replace(
            attn_mask=_meta(tokens, tokens, dtype=torch.bool if "bool" in words else dtype)
        )
    return options._replace(key_mask=_meta(BATCH, tokens, dtype=torch.bool) if "keys" in words else None)


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
