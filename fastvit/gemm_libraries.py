"""torch's own GEMM libraries on a device, each as a context to take a baseline under.

Two right GEMMs that add in another order differ by more than a tight tolerance allows, so a float32 GEMM is
judged against the worse of torch's own. On a CPU torch carries two, MKL and oneDNN, and calls the first for
dense float32.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def gemm_libraries(device: torch.device | str) -> list[tuple[str, Callable[[], AbstractContextManager]]]:
    """List ``(name, context)``; under ``context()`` ``torch.nn.functional.linear`` runs in that library.

    The first is the one torch takes by itself. Forward and gradients both follow; dtypes other than float32,
    and calls under autocast, stay with torch's choice.
    """
    if torch.device(device).type != "cpu":
        return [("default", nullcontext)]
    libraries = [("mkl" if torch.backends.mkl.is_available() else "default", nullcontext)]
    if torch.backends.mkldnn.is_available():
        libraries.append(("onednn", OneDNNLinear))
    return libraries


class OneDNNLinear(TorchFunctionMode):
    """Sends ``torch.nn.functional.linear`` of float32 CPU tensors, and its gradients, through oneDNN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not linear:
            return func(*args, **kwargs)
        x, weight, bias = _arguments(*args, **kwargs)
        if _served(x, weight, bias):
            return _Linear.apply(x, weight, bias)
        return func(x, weight, bias)


def _arguments(input, weight, bias=None):
    return input, weight, bias


def _served(*tensors: torch.Tensor | None) -> bool:
    return not torch.is_autocast_enabled("cpu") and all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0) for t in tensors
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """All three products of a linear layer, so that gradients come from the output's library."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, weight.shape[0])
        dx = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = _product(rows.t(), x.reshape(-1, weight.shape[1]).t()) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias
