"""Where the compiled ops can run, and where they have been measured to be worth it.

The C++ library ("cpp") serves the CPU, the CUDA library ("cuda") GPUs. ``can_run`` answers None or the reason
why not, and ``worth`` what `auto` asks beside: whether this machine is known to run such a call right and no
slower than torch. Both take the op's arguments, or none of them for "any call on this machine"; they look at
metadata only, and the library is loaded by the first call that could use it.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension, fc1_tiles, gpus, measurements
from .call_facts import attention_sizes, compute_dtype, exporting, needs_gradient, tf32, without_rules
from .errors import ExtensionMismatch, ExtensionNotBuilt

OLDEST = (8, 0)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


class Call(NamedTuple):
    """What matters of a call. ``stream`` is what the output is added to, and has its dtype; or None."""

    x: Tensor
    weight: Tensor
    stream: Tensor | None
    norms: tuple[Tensor | None, ...]
    scales: tuple[Tensor | None, ...]
    sample_scale: Tensor | None


def _layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, **_) -> Call:
    weight = weight if isinstance(weight, Tensor) else weight[0]  # several weights are of one kind
    return Call(x, weight, None, (norm_weight, norm_bias), (), None)


def _linear_residual(x, weight, bias, residual, *, layer_scale=None, sample_scale=None, **_) -> Call:
    return Call(x, weight, residual, (), (layer_scale, sample_scale), sample_scale)


def _layer_norm_mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    *_,
    layer_scale=None,
    sample_scale=None,
    inner_norm_weight=None,
    inner_norm_bias=None,
    **__,
) -> Call:
    norms = (norm_weight, norm_bias, inner_norm_weight, inner_norm_bias)
    return Call(x, fc1_weight, x, norms, (layer_scale, sample_scale), sample_scale)


CALLS = {
    "layer_norm_linear": _layer_norm_linear,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
}


def can_run(op: str, device: str, *args, **options) -> str | None:
    """The reason why the library for ``device``, "cpu" or "cuda", cannot run this call, or None."""
    if not args and not options:
        return _loads(device) or _no_device(device)
    call = CALLS[op](*args, **options)
    if call.x.device.type != device:
        return f"it is for {_NAMES[device]}; the tensors are on {call.x.device.type}"
    reason = _loads(device) or (_too_old(call.x.device) if device == "cuda" else None)
    if reason is not None:
        return reason
    if reason := without_rules():
        return f"it {reason}"
    return _wrong_dtypes(call, device) or _unserved(call)


def _wrong_dtypes(call: Call, device: str) -> str | None:
    dtype, x_dtype = compute_dtype(call.weight), call.x.dtype
    if dtype not in DTYPES[device]:
        return f"it takes {', '.join(map(_named, DTYPES[device]))}, not {_named(dtype)}"
    half_too = (dtype, torch.float32) if dtype != torch.float64 else (dtype,)
    if x_dtype not in half_too:
        return f"it takes no {_named(x_dtype)} beside {_named(dtype)}"
    for tensor in (call.stream, *call.norms):
        if tensor is not None and tensor.dtype != x_dtype and tensor.dtype not in half_too:
            return f"it takes no {_named(tensor.dtype)} beside {_named(dtype)}"
    for scale in call.scales:
        if scale is not None and torch.promote_types(scale.dtype, call.stream.dtype) != call.stream.dtype:
            result = torch.promote_types(scale.dtype, call.stream.dtype)
            return f"under autocast the result is {_named(result)}, and it writes {_named(call.stream.dtype)}"
    return None


def _unserved(call: Call) -> str | None:
    if call.sample_scale is not None and needs_gradient(call.sample_scale):
        return "it gives no gradient to sample_scale"
    if call.x.shape[-1] == 0 or call.weight.shape[0] == 0:
        return "a width is 0"
    return None


def worth(op: str, device: str, *args, **options) -> str | None:
    """Why `auto` leaves what the library can run: it was not measured here, or measured wrong or slower."""
    name = machine_name(device)
    if not args and not options:
        return None if measurements.any_of(op, name) else f"not measured on {name}"
    call = CALLS[op](*args, **options)
    dtype, rows = compute_dtype(call.weight), call.x.shape[0] * call.x.shape[1]
    named = "tf32" if device == "cuda" and dtype == torch.float32 and tf32(op) else _named(dtype)
    recorded = needs_gradient(*_flat(args), *options.values())
    directions = ("fwd", "bwd") if recorded else ("fwd",)
    width = call.x.shape[-1] if call.stream is None else call.stream.shape[-1]
    sizes = {"width": width, "rows": rows}
    beside = _beside(call, options, bool(options.get("frozen")) and not recorded)
    reason = measurements.refusal(op, name, named, directions, beside, sizes)
    if reason is None or torch.compiler.is_compiling():
        return reason
    return f"{reason} on {name} at D = {width}"


def _flat(args: tuple) -> list:
    """With several weights and biases one after the other."""
    return [one for value in args for one in (value if isinstance(value, tuple) else (value,))]


def _beside(call: Call, options: dict, frozen: bool) -> str:
    """What a table names of a call beside the plain op."""
    beside = {
        # Weights that are read in a copy made for it.
        "frozen": frozen,
        "gated": options.get("activation") == "swiglu",
        "inner_norm": len(call.norms) == 4 and call.norms[2] is not None,
        "scaled": any(scale is not None for scale in call.scales),
        # Tokens in float32 beside products in half precision, as autocast has them.
        "mixed": call.stream is not None and call.stream.dtype != compute_dtype(call.weight),
    }
    return "+".join([what for what, given in beside.items() if given])


def can_run_attention(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    **options,
) -> str | None:
    """Of the CPU library. Norms, rotations and masks are torch's own before it: it takes what they give."""
    if q is None:
        return _loads("cpu")
    if q.device.type != "cpu":
        return f"it is for CPUs; the tensors are on {q.device.type}"
    if reason := _loads("cpu"):
        return reason
    if reason := without_rules():
        return f"it {reason}"
    if compute_dtype(v) != torch.float32 or v.dtype != torch.float32:
        return f"its attention takes float32, not {_named(compute_dtype(v))}"
    if k.shape[2:] != q.shape[2:] or v.shape != k.shape:
        return "its attention takes q, k and v of the same heads and channels"
    if dropout_p:
        return "its attention has no dropout of weights"
    if needs_gradient(q, k, v, *options.values()) and not exporting():
        return "its attention is for inference: it gives no gradients"
    return None


def worth_attention(q: Tensor | None = None, *args, **options) -> str | None:
    name = machine_name("cpu")
    if q is None:
        return None if measurements.any_of("attention", name) else f"not measured on {name}"
    masked = any(options.get(mask) is not None for mask in ("attn_mask", "key_mask"))
    beside = "mask" if masked else "causal" if options.get("is_causal") else ""
    sizes = attention_sizes(q)
    reason = measurements.refusal("attention", name, _named(q.dtype), ("fwd",), beside, sizes)
    if reason is None or torch.compiler.is_compiling():
        return reason
    return f"{reason} on {name} at head_dim {sizes['head_dim']}, N = {sizes['tokens']}"


_NAMES = {"cpu": "CPUs", "cuda": "CUDA GPUs"}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _loads(device: str) -> str | None:
    """Why the library for the device is not there: absence and misfit are one line of text each."""
    if device == "cuda" and gpus.assumed() is not None:
        return None  # it answers for another machine
    if device == "cuda" and not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    reason: ExtensionMismatch | ExtensionNotBuilt | None = extension.why_no_ops(device)
    if reason is None and device == "cuda":
        fc1_tiles.load_once()
    return None if reason is None else str(reason)


def _no_device(device: str) -> str | None:
    if device == "cpu":
        return None
    if gpus.assumed() is None and not torch.cuda.is_available():
        return "it needs a CUDA GPU; torch finds none"
    return _too_old(torch.device("cuda"))


def _too_old(device: torch.device) -> str | None:
    """Why the library holds no code that this GPU runs: its own, or that of a lower minor version."""
    return _no_code(gpus.gpu_of(device))


@cache
def _no_code(gpu: gpus.Gpu) -> str | None:
    if gpu.assumed:
        return None if gpu.capability >= OLDEST else f"{gpu.name} is older than sm_{OLDEST[0]}{OLDEST[1]}"
    archs = extension.cuda_archs()
    if any(_runs(arch, *gpu.capability) for arch in archs):
        return None
    built = ", ".join(f"sm_{arch}" for arch in archs) or "nothing"
    return "{} is sm_{}{}, and the library is built for {}".format(gpu.name, *gpu.capability, built)


def _runs(arch: str, major: int, minor: int) -> bool:
    number = int(arch.rstrip("a"))
    return number // 10 == major and (number % 10 == minor if arch.endswith("a") else number % 10 <= minor)


def machine_name(device: str) -> str:
    """What measurements are of: a GPU by its name, a CPU by the instructions that decide."""
    if device == "cuda":
        return gpus.gpu_of().name if gpus.is_there() else "a CUDA GPU"
    return _cpu_name()


@cache
def _cpu_name() -> str:
    bf16 = " and bfloat16" if multiplies_bfloat16() else ""
    return f"CPU with {vectors()}{bf16}"


@cache
def vectors() -> str:
    """The CPU's vector instructions as torch names them: "AVX2", say."""
    return torch.backends.cpu.get_cpu_capability()


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions by which oneDNN multiplies bfloat16, and packs weights in it."""
    # torch.jit.trace would take the question for an op of the model, and fail at an answer that is no tensor.
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    finally:
        torch._C._set_tracing_state(tracing)


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's; a cache hides it.
for _constant in (_loads, _no_device, _too_old, machine_name):
    _constant._dynamo_marked_constant = True
