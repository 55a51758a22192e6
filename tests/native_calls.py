"""Calls of the ops that the compiled libraries serve, and their gradients."""

from collections.abc import Callable
from functools import partial

import op_cases
import pytest
import torch
from op_cases import Call
from op_checks import GRADS, gradients

from fastvit import extension, ops

OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
DTYPES = (torch.float32, torch.bfloat16)  # and float64, which is judged for equality
FIXED = ("sample_scale",)  # the libraries give it no gradient
# The MLP's gradients that came through fc2 and the activation, or are of rows that did: all but fc2_bias's.
THROUGH = {
    "layer_norm_mlp": (
        *("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "gate_weight", "gate_bias"),
        *("inner_norm_weight", "inner_norm_bias"),
    )
}


def needs_library() -> pytest.MarkDecorator:
    """Skips where the CPU library is not, with the reason; loads it."""
    reason = extension.why_no_ops("cpu")
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def trained(
    op: str, call: Call, grad: str = "contiguous", function: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the public op, by name."""
    return gradients(function or getattr(ops, op), call, GRADS[grad], FIXED)


def leaves(call: Call) -> Call:
    """The call with everything requiring gradients that can have them."""
    given = op_cases.tensors(call).items()
    return call | {name: t.detach().clone().requires_grad_(name not in FIXED) for name, t in given}


def frozen(op: str) -> Callable:
    """The op on copies of its weights, packed and folded."""
    return partial(getattr(ops, op), frozen=True)


def while_training(op: str) -> Callable:
    """The op as it runs where gradients are recorded: with more saved."""

    def function(**call) -> torch.Tensor:
        with torch.enable_grad():
            out = getattr(ops, op)(**leaves(call))
        assert out.requires_grad
        return out.detach()

    return function
