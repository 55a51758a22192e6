"""Other libraries' kernels for our ops, where they are installed: all of them want a CUDA GPU."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


def xformers(qkv: Tensor, *, heads: int) -> Tensor:
    """Memory-efficient attention, by the kernel that xformers chooses."""
    attend = import_module("xformers.ops").memory_efficient_attention
    return attend(*_heads(qkv, heads)).flatten(2)


def flash_attn(qkv: Tensor, *, heads: int) -> Tensor:
    """FlashAttention-2, of the packed projection as it is."""
    attend = import_module("flash_attn").flash_attn_qkvpacked_func
    return attend(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


def flash_attn_3(qkv: Tensor, *, heads: int) -> Tensor:
    """FlashAttention-3, which is for Hopper."""
    out = import_module("flash_attn_interface").flash_attn_func(*_heads(qkv, heads))
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v as [B, N, H, d]."""
    return qkv.unflatten(-1, (3, heads, -1)).unbind(2)


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Liger's LayerNorm."""
    return import_module("liger_kernel.transformers.functional").liger_layer_norm(x, weight, bias, eps)


def liger_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """layer_norm_linear with Liger's LayerNorm."""
    return F.linear(liger_layer_norm(x, norm_weight, norm_bias), weight, bias)


def liger_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """layer_norm_mlp with Liger's LayerNorm."""
    h = F.linear(liger_layer_norm(x, norm_weight, norm_bias), fc1_weight, fc1_bias)
    return x + F.linear(F.gelu(h), fc2_weight, fc2_bias)


Peer = tuple[str, Callable[..., Tensor]]
# The package that each is in.
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "xformers": ("xformers", xformers),
        "flash-attn": ("flash_attn", flash_attn),
        "flash-attn 3": ("flash_attn_interface", flash_attn_3),
    },
    "layer_norm_linear": {"liger": ("liger_kernel", liger_linear)},
    "layer_norm_mlp": {"liger": ("liger_kernel", liger_mlp)},
}


def peers(op: str, device: torch.device) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """The op by other libraries, and those that are left out, with the reason."""
    found, absent = {}, {}
    for name, (package, forward) in PEERS.get(op, {}).items():
        if device.type != "cuda":
            absent[name] = "it is for CUDA GPUs"
        elif find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        else:
            found[name] = forward
    return found, absent
