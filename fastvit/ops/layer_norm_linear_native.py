"""layer_norm_linear in the compiled libraries: the registered ops, their shapes, and their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient
from . import choices, native, registration

OP = "layer_norm_linear"
# Biases are none, or one of each weight: torch.jit.trace has no lists of tensors that may be absent.
INPUTS = "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] biases"


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    eps: float,
    norm: str,
    frozen: bool,
    moments: Tensor | None,
) -> Tensor:
    """The public op's call; under autocast the product is in low precision and the norm in float32."""
    dtype = compute_dtype(weights[0])
    biases = given_biases(weights, biases)
    inputs = (x, norm_weight, norm_bias, list(weights), list(biases))
    if registration.records_gradients(x, norm_weight, norm_bias, *weights, *biases):
        return _recorded(*inputs, eps, norm, dtype, frozen)
    return registration.call(_fwd, *inputs, eps, norm, dtype, False, frozen, moments)[0]


def given_biases(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> list[Tensor]:
    """A bias for each weight, or none."""
    if all(bias is None for bias in biases):
        return []
    both = zip(weights, biases, strict=True)
    return [w.new_zeros(len(w)) if bias is None else bias for w, bias in both]


def _recorded(x, norm_weight, norm_bias, weights, biases, eps, norm, dtype, frozen):
    """Several weights have their gradients by way of one that is made of them for this call."""
    if frozen:
        native.release(weights)
    cast = native.joined(weights).to(dtype), native.joined(biases).to(dtype) if biases else None
    return Node.apply(x, norm_weight, norm_bias, *cast, eps, norm)


class Node(Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, norm):
        inputs = (x, norm_weight, norm_bias, [weight], [] if bias is None else [bias])
        out, saved = registration.call(_fwd, *inputs, eps, norm, weight.dtype, True, False)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, *saved)
        ctx.eps, ctx.norm = eps, norm
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        given = iter(
            registration.call(_bwd, grad, x, saved, norm_weight, norm_bias, weight, ctx.eps, ctx.norm, needs)
        )
        return *[next(given) if needed else None for needed in needs], None, None


def decided(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype, frozen: bool
) -> choices.How:
    """How a forward call on x [B, N, K] runs."""
    lies = native.as_they_lie(x, weights, biases, None, dtype, frozen)
    return choices.How(dtype, lies, choices.allows_tf32(x), frozen and choices.folds(OP, x, weights, dtype))


def forward(
    x, norm_weight, norm_bias, weights, biases, eps, norm, save, frozen, moments, how: choices.How
) -> tuple[Tensor, list[Tensor]]:
    """The registered op in the libraries, as was decided."""
    folded = native.folded(norm_weight, norm_bias, weights, biases, how.dtype) if how.folds else []
    if not how.as_they_lie:
        weights, biases, _ = native.product(x, weights, biases, None, how.dtype, frozen)
    given = (x, norm_weight, norm_bias, weights, biases, eps, norm, folded, moments, save)
    return native.ops.layer_norm_linear_fwd(*given, how.tf32)


def _fwd_kernels(x, norm_weight, norm_bias, weights, biases, eps, norm, dtype, save, frozen, moments=None):
    how = decided(x, weights, biases, dtype, frozen)
    return forward(x, norm_weight, norm_bias, weights, biases, eps, norm, save, frozen, moments, how)


def _fwd_shapes(x, norm_weight, norm_bias, weights, biases, eps, norm, dtype, save, frozen, moments=None):
    out = x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)), dtype=dtype)
    return out, native.statistics_shapes(x, x.shape[0] * x.shape[1], norm, dtype) if save else []


def _fwd_autograd(x, norm_weight, norm_bias, weights, biases, eps, norm, dtype, save, frozen, moments=None):
    inputs = (x, norm_weight, norm_bias, weights, biases)
    if needs_gradient(x, norm_weight, norm_bias, *weights, *biases):
        return _recorded(*inputs, eps, norm, dtype, frozen), []
    return registration.below_autograd(_fwd, *inputs, eps, norm, dtype, save, frozen, moments)


def _bwd_kernels(grad, x, saved, norm_weight, norm_bias, weight, eps, norm, needs):
    return native.ops.layer_norm_linear_bwd(
        *(grad, x, saved, norm_weight, norm_bias, weight, eps, norm),
        *(native.bits(needs), choices.allows_tf32(x)),
    )


def _bwd_shapes(grad, x, saved, norm_weight, norm_bias, weight, eps, norm, needs):
    return native.gradient_shapes((x, norm_weight, norm_bias, weight, weight[:, 0]), needs)


_fwd = registration.register(
    f"layer_norm_linear_fwd({INPUTS}, float eps, str norm, ScalarType dtype, bool save, bool frozen, "
    "Tensor? moments=None) -> (Tensor, Tensor[])",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
)
_bwd = registration.register(
    "layer_norm_linear_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight, float eps, str norm, bool[5] needs) -> Tensor[]",
    _bwd_kernels,
    _bwd_shapes,
)
