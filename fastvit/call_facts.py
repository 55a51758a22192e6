"""What a backend asks of a call before it takes it: metadata and torch's own settings, no data."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference.normalization import is_autocast


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """In which dtype torch's own op would run: autocast's, except for float64."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensor.dtype
    if is_autocast(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def needs_gradient(*values: Any) -> bool:
    """Whether torch is to record gradients for one of the values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def transformed() -> bool:
    """Inside vmap, torch.func.grad, jvp and the like; a compiler has rules of its own for them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def exporting() -> str | None:
    """Why a call is one of a program that is made for elsewhere, where no fastvit may be, or None.

    By torch.export (so AOTInductor and ONNX too), or by torch.jit.trace; what torch.compile makes stays here.
    """
    if torch.compiler.is_compiling():
        # What is_exporting() reads: as 2.11's compiler traces that function, it is always True.
        return _EXPORTING if torch.compiler._is_exporting_flag else None
    return None if torch._C._get_tracing_state() is None else _EXPORTING


_EXPORTING = "exporting: the program is of torch's own ops, unless a backend is named"


def without_rules() -> str | None:
    """Why no kernel of ours can be part of what is made of the call, or None."""
    if transformed():
        return "has no rules for torch.func's transforms and forward-mode derivatives"
    if exporting() and _is_for_onnx():
        return "is no op of ONNX: name no backend, and the model is exported as torch's own ops"
    return None


def _is_for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def tf32(op: str) -> bool:
    """Whether float32 products may be tf32, decided as torch decides for the op that ours stands for."""
    kind = "conv" if op == "patch_embed" else "matmul"
    return torch._C._get_fp32_precision_getter("cuda", kind) == "tf32"


def attention_sizes(q: Tensor) -> dict[str, int]:
    """The sizes by which attention of q [B, N, H, d] is measured."""
    batch, tokens, heads, head_dim = q.shape
    return {"head_dim": head_dim, "tokens": tokens, "batch_heads": batch * heads}


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's.
for _constant in (tf32, _is_for_onnx):
    _constant._dynamo_marked_constant = True
