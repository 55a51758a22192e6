"""Calls of the ops that the compiled libraries serve, and their gradients."""

from collections.abc import Callable

import op_cases
import pytest
import torch
from op_cases import Call
from op_checks import GRADS, gradients

from fastvit import extension, ops

OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
DTYPES = (torch.float32, torch.bfloat16)  # and float64, which is judged for equality
FIXED = ("sample_scale",)  # the libraries give it no gradient

_absent = extension.why_no_ops("cpu")
needs_library = pytest.mark.skipif(_absent is not None, reason=str(_absent))


def trained(
    op: str, call: Call, grad: str = "contiguous", function: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the public op, by name."""
    return gradients(function or getattr(ops, op), call, GRADS[grad], FIXED)


def leaves(call: Call) -> Call:
    """The call with everything requiring gradients that can have them."""
    given = op_cases.tensors(call).items()
    return call | {name: t.detach().clone().requires_grad_(name not in FIXED) for name, t in given}


def regime(op: str, *, activation: str | None = None, **cell) -> Call:
    """The contract's inputs, the MLP's with any activation: a gate of its own is fc1 turned round."""
    call = op_cases.regime_call(op, **cell)
    if activation is None:
        return call
    if activation == "swiglu":
        call["fc2_weight"] = call["fc2_weight"][:, : len(call["fc1_weight"]) // 2].contiguous()
    if activation == "swiglu, own gate":
        call |= {"gate_weight": call["fc1_weight"].flip(0), "gate_bias": call["fc1_bias"].flip(0)}
    return call | {"activation": activation.partition(",")[0]}
