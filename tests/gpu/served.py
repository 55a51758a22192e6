"""What the ops take, and what they give their kernels: no test is of a call that no user can make."""

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from gpu_calls import NATIVE, leaves_of
from op_cases import Call
from torch import Tensor

from fastvit import native_backend, triton_backend
from fastvit_kernels import attention, patch_embed


def refusal(op: str, call: Call, *, backward: bool = False) -> str | None:
    """Why the op's kernels take this call on no machine, or its gradients, or None."""
    call = call | (leaves_of(op, call) if backward else {})
    if op in NATIVE:
        facts = native_backend.CALLS[op](**call)
        return native_backend._wrong_dtypes(facts, "cuda") or native_backend._unserved(facts)
    with mock.patch.object(triton_backend, "_machine", lambda tensor: None):
        if op == "patch_embed":
            return triton_backend.can_run_patch_embed(**call)
        options = {name: value for name, value in call.items() if name not in ("qkv", "num_heads")}
        views = call["qkv"].unflatten(-1, (3, call["num_heads"], -1)).unbind(2)
        return triton_backend.can_run_attention(*views, **options)


def served(op: str, cells: list[Call], call_of: Callable[[Call], Call]) -> list[Call]:
    """The cells that the op takes, with the gradient "None" where it takes the forward alone."""
    kept = []
    for cell in cells:
        call = call_of(cell)
        if refusal(op, call) is None:
            kept.append(cell | {"grad": None} if refusal(op, call, backward=True) else cell)
    return kept


def _side_by_side(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _exact(images: Tensor, weight: Tensor, precision: str) -> Tensor:
    wide = weight.dtype == torch.float32 and precision == "ieee" and images.dtype == torch.uint8
    return images.float() / 255 if wide else images


def _attention_bwd(grad, *args, **options):
    return attention.attention_bwd(_side_by_side(grad), *args, **options)


def _patch_embed_fwd(images, weight, *args, precision, **options):
    images = _exact(images, weight, precision)
    return patch_embed.patch_embed_fwd(images, weight, *args, precision=precision, **options)


def _patch_embed_bwd(grad, images, weight, *, precision, **options):
    given = (_side_by_side(grad), _exact(images, weight, precision), weight)
    return patch_embed.patch_embed_bwd(*given, precision=precision, **options)


# The kernels' launchers, given what the ops make of their arguments: a gradient's channels lie side by side,
# and bytes whose products are to be exact are floats.
KERNELS = SimpleNamespace(
    attention=SimpleNamespace(attention_fwd=attention.attention_fwd, attention_bwd=_attention_bwd),
    patch_embed=SimpleNamespace(patch_embed_fwd=_patch_embed_fwd, patch_embed_bwd=_patch_embed_bwd),
)
