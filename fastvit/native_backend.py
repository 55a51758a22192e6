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

from . import extension, measurements
from .call_facts import compute_dtype, needs_gradient, tf32, transformed
from .errors import ExtensionMismatch, ExtensionNotBuilt

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
    parameters: tuple[Tensor | None, ...]
    beside: dict[str, bool]
    sizes: dict[str, int]


def _layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, norm="layer_norm", **_) -> Call:
    norms = (norm_weight, norm_bias)
    sizes = {"width": x.shape[-1], "out": weight.shape[0], "rows": x.shape[0] * x.shape[1]}
    return Call(x, weight, None, norms, (), None, (*norms, weight, bias), _mixed(x, weight), sizes)


def _linear_residual(x, weight, bias, residual, *, layer_scale=None, sample_scale=None) -> Call:
    beside = {"scaled": layer_scale is not None or sample_scale is not None} | _mixed(residual, weight)
    sizes = {"width": weight.shape[0], "inner": x.shape[-1], "rows": x.shape[0] * x.shape[1]}
    parameters = (weight, bias, residual, layer_scale)
    return Call(x, weight, residual, (), (layer_scale, sample_scale), sample_scale, parameters, beside, sizes)


def _layer_norm_mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    *,
    activation="gelu",
    layer_scale=None,
    sample_scale=None,
    gate_weight=None,
    gate_bias=None,
    inner_norm_weight=None,
    inner_norm_bias=None,
    **_,
) -> Call:
    norms, inner = (norm_weight, norm_bias), (inner_norm_weight, inner_norm_bias)
    beside = {
        "gated": activation == "swiglu",
        "inner_norm": inner_norm_weight is not None,
        "scaled": layer_scale is not None or sample_scale is not None,
        **_mixed(x, fc1_weight),
    }
    products = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias)
    sizes = {"width": x.shape[-1], "hidden": fc2_weight.shape[1], "rows": x.shape[0] * x.shape[1]}
    scales, parameters = (layer_scale, sample_scale), (*norms, *inner, *products, layer_scale)
    return Call(x, fc1_weight, x, (*norms, *inner), scales, sample_scale, parameters, beside, sizes)


def _mixed(stream: Tensor, weight: Tensor) -> dict[str, bool]:
    """Tokens in float32 beside products in half precision, as autocast has them."""
    return {"mixed": stream.dtype != compute_dtype(weight)}


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
    if transformed():
        return "it has no rules for torch.func's transforms and forward-mode derivatives"
    return _wrong_dtypes(call, device) or _unserved(call)


def _wrong_dtypes(call: Call, device: str) -> str | None:
    dtype = compute_dtype(call.weight)
    if dtype not in DTYPES[device]:
        return f"it takes {', '.join(map(_named, DTYPES[device]))}, not {_named(dtype)}"
    half_too = (dtype, torch.float32) if dtype != torch.float64 else (dtype,)
    for tensor in (call.x, call.stream, *call.norms):
        if tensor is not None and tensor.dtype not in half_too and tensor.dtype != call.x.dtype:
            return f"it takes no {_named(tensor.dtype)} beside {_named(dtype)}"
    if call.x.dtype not in half_too:
        return f"it takes no {_named(call.x.dtype)} beside {_named(dtype)}"
    wider = [t.dtype for t in call.scales if t is not None and call.stream is not None]
    wider = [found for found in wider if torch.promote_types(found, call.stream.dtype) != call.stream.dtype]
    if wider:
        return f"under autocast the result is {_named(wider[0])}, and it writes {_named(call.stream.dtype)}"
    return None


def _unserved(call: Call) -> str | None:
    if needs_gradient(call.sample_scale):
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
    dtype = compute_dtype(call.weight)
    named = "tf32" if device == "cuda" and dtype == torch.float32 and tf32(op) else _named(dtype)
    directions = ("fwd", "bwd") if needs_gradient(call.x, *call.parameters) else ("fwd",)
    beside = "+".join([what for what, given in call.beside.items() if given])
    reason = measurements.refusal(op, name, named, directions, beside, call.sizes)
    if reason is None or torch.compiler.is_compiling():
        return reason
    return f"{reason} on {name} at D = {call.sizes['width']}"


_NAMES = {"cpu": "CPUs", "cuda": "CUDA GPUs"}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _loads(device: str) -> str | None:
    """Why the library for the device is not there: absence and misfit are one line of text each."""
    if device == "cuda" and not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    reason: ExtensionMismatch | ExtensionNotBuilt | None = extension.why_no_ops(device)
    return None if reason is None else str(reason)


def _no_device(device: str) -> str | None:
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU; torch finds none"
    return _too_old(torch.device("cuda"))


def _too_old(device: torch.device) -> str | None:
    """Why the library holds no code that this GPU runs: its own, or that of a lower minor version."""
    return _no_code(device)


@cache
def _no_code(device: torch.device) -> str | None:
    facts = torch.cuda.get_device_properties(device)
    archs = extension.cuda_archs()
    if any(_runs(arch, facts.major, facts.minor) for arch in archs):
        return None
    built = ", ".join(f"sm_{arch}" for arch in archs) or "nothing"
    return f"{facts.name} is sm_{facts.major}{facts.minor}, and the library is built for {built}"


def _runs(arch: str, major: int, minor: int) -> bool:
    number = int(arch.rstrip("a"))
    return number // 10 == major and (number % 10 == minor if arch.endswith("a") else number % 10 <= minor)


def machine_name(device: str) -> str:
    """What measurements are of: a GPU by its name, a CPU by the instructions that decide."""
    return _machine_name(device)


@cache
def _machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CUDA GPU"
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}{' and bfloat16' if bf16 else ''}"


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's; it sees through caches.
for _constant in (_loads, _no_device, _too_old, machine_name):
    _constant._dynamo_marked_constant = True
