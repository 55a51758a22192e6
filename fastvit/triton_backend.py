"""Where the Triton kernels can run, and where they have been measured to be worth it. No triton is imported.

For each op, ``can_run_<op>`` answers None or the reason why not, and ``worth_<op>`` what `auto` asks beside:
whether this GPU model is known to run such a call right and no slower than torch. Both take the op's
arguments, or none of them for "any call on this machine", and look at metadata only.
"""

import importlib.util
import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import gpus, measurements
from .call_facts import attention_sizes, compute_dtype, needs_gradient, tf32, without_rules

OLDEST_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
# Channels a head up to which no tile spills: without and with masks, norms or rotary positions.
FORWARD_LIMITS, BACKWARD_LIMITS = (MAX_HEAD_DIM, 128), (128, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# As triton itself reads it, once: kernels that were imported with it are interpreted ever after.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def can_run_attention(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    **options,
) -> str | None:
    reason = _machine(q)
    if reason is not None or q is None:
        return reason
    if dropout_p:
        return "its kernels have no dropout of attention weights"
    if is_causal:
        return "its kernels have no causal form"
    if scale is not None and not scale > 0:
        return f"its kernels need a scale above 0, not {scale}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"its kernels take up to {MAX_HEAD_DIM} channels a head, not {q.shape[-1]}"
    if needs_gradient(attn_mask, rope_cos, rope_sin):
        return "its kernels give no gradients to attn_mask, rope_cos and rope_sin"
    given = (attn_mask, options.get("key_mask"), options.get("qk_norm"), rope_cos)
    loaded = any(option is not None for option in given)
    gradient = needs_gradient(q, k, v, *_norm_weights(options))
    limit = (BACKWARD_LIMITS if gradient else FORWARD_LIMITS)[loaded]
    if q.shape[-1] > limit:
        what = "gradients" if gradient else "attention"
        beside = " beside masks, norms and rotary positions" if loaded else ""
        return f"its kernels take up to {limit} channels a head for {what}{beside}, not {q.shape[-1]}"
    return None


def _norm_weights(options: dict[str, Any]) -> list[Tensor | None]:
    return [options.get(f"{part}_norm_{kind}") for part in "qk" for kind in ("weight", "bias")]


def worth_attention(q: Tensor | None = None, *args, **options) -> str | None:
    if q is None:
        return _worth("attention", None)
    sizes = attention_sizes(q)
    beside = {
        "causal": options.get("is_causal"),
        "key_mask": options.get("key_mask") is not None,
        "mask": options.get("attn_mask") is not None,
        "norm": options.get("qk_norm") is not None,
        "rope": options.get("rope_cos") is not None,
    }
    gradient = needs_gradient(q, *args, *_norm_weights(options))
    reason = _worth("attention", q, _names(beside), gradient, sizes)
    if reason is None or torch.compiler.is_compiling():  # a size in a text would be a constant to a compiler
        return reason
    return f"{reason} at head_dim {sizes['head_dim']}, N = {sizes['tokens']}"


def can_run_patch_embed(
    images: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> str | None:
    reason = _machine(weight)
    if reason is not None or weight is None:
        return reason
    wider = [t.dtype for t in (pos_embed, prefix) if t is not None and t.dtype != compute_dtype(weight)]
    if wider:
        return f"under autocast the tokens are {wider[0]}, and its kernels write {compute_dtype(weight)}"
    if needs_gradient(mean, std):
        return "its kernels give no gradients to mean and std"
    return None


def worth_patch_embed(images: Tensor | None = None, weight: Tensor | None = None, *args, mean=None, std=None):
    if images is None or weight is None:
        return _worth("patch_embed", None)
    (batch, _, height, width), (dim, channels, ph, pw) = images.shape, weight.shape
    sizes = {"patch": ph, "patch_width": pw, "channels": channels, "width": dim}
    sizes["rows"] = batch * ((height // ph) * (width // pw))
    beside = {
        "bytes": images.dtype == torch.uint8,
        "normalized": mean is not None or std is not None,
        "channels_last": images.stride(1) == 1 and channels > 1,
    }
    reason = _worth("patch_embed", weight, _names(beside), needs_gradient(images, weight, *args), sizes)
    if reason is None or torch.compiler.is_compiling():
        return reason
    return f"{reason} at {ph}x{pw} patches, D = {dim}"


def _names(beside: dict[str, bool]) -> str:
    return "+".join([name for name, given in beside.items() if given])


def _machine(tensor: Tensor | None) -> str | None:
    """The reason why this machine, or this tensor's device and dtype, cannot be served."""
    reason = _software()
    if reason is not None:
        return reason
    if tensor is None:
        if _interpreted():
            return None
        if gpus.assumed() is None and not torch.cuda.is_available():
            return "Triton needs a CUDA GPU; torch finds none"
        return _too_old(torch.device("cuda"))
    device, dtype = tensor.device, compute_dtype(tensor)
    if device.type == "meta":
        return "meta tensors have no data"
    if device.type != "cuda" and not (_interpreted() and device.type == "cpu"):
        return f"Triton needs a CUDA GPU; the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"its kernels take float16, bfloat16 and float32, not {dtype}"
    if reason := without_rules():
        return f"it {reason}"
    if _interpreted():
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    return _too_old(device)


def _interpreted() -> bool:
    """Whether kernels run in the interpreter here; for a GPU that is assumed the answer is as there."""
    return INTERPRETED and gpus.assumed() is None


def _software() -> str | None:
    return _installed()


@cache
def _installed() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"Triton runs on Linux; this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs; this torch is built for AMD's"
    return None


def _too_old(device: torch.device) -> str | None:
    gpu = gpus.gpu_of(device)
    if gpu.capability >= OLDEST_CAPABILITY:
        return None
    found, oldest = (".".join(map(str, pair)) for pair in (gpu.capability, OLDEST_CAPABILITY))
    return f"{gpu.name} has compute capability {found}; the kernels need {oldest}"


def _worth(
    op: str, tensor: Tensor | None, options: str = "", gradient: bool = False, sizes: dict | None = None
) -> str | None:
    device = torch.device("cuda") if tensor is None else tensor.device
    if _interpreted() or device.type != "cuda":
        return "Triton's interpreter is for tests"
    name = gpus.gpu_of(device).name
    if sizes is None:
        return None if measurements.any_of(op, name) else f"not measured on {name}"
    dtype = compute_dtype(tensor)
    named = "tf32" if dtype == torch.float32 and tf32(op) else str(dtype).removeprefix("torch.")
    directions = ("fwd", "bwd") if gradient else ("fwd",)
    reason = measurements.refusal(op, name, named, directions, options, sizes)
    return None if reason is None else f"{reason} on {name}"


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's.
for _constant in (_software, _too_old):
    _constant._dynamo_marked_constant = True
