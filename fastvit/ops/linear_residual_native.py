"""linear_residual in the compiled libraries: the registered ops, their shapes, and their gradients."""

import torch
from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient
from . import choices, native, registration

OP = "linear_residual"
INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? sample_scale"


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    frozen: bool,
    with_moments: bool,
) -> tuple[Tensor, Tensor | None]:
    """The public op's call; under autocast the product is in low precision, the sum as the residual is."""
    dtype = compute_dtype(weight)
    inputs = (x, weight, bias, residual, layer_scale, sample_scale)
    if registration.records_gradients(*inputs[:5]):
        return _recorded(*inputs, dtype, frozen), None
    with_moments = with_moments and choices.gives_moments(OP, residual, x.shape[-1], dtype)
    out, moments = registration.call(_fwd, *inputs, dtype, frozen, False, with_moments)
    return out, moments[0] if moments else None


def _recorded(x, weight, bias, residual, layer_scale, sample_scale, dtype, frozen):
    if frozen:
        native.release((weight,))
    cast = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Node.apply(x, *cast, residual, layer_scale, sample_scale)


class Node(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, layer_scale, sample_scale):
        inputs = (x, weight, bias, residual, layer_scale, sample_scale)
        out, saved = registration.call(_fwd, *inputs, weight.dtype, False, True)
        ctx.save_for_backward(x, weight, layer_scale, sample_scale, *saved)
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad):
        x, weight, layer_scale, sample_scale, *saved = ctx.saved_tensors
        x_needed, weight_needed, bias_needed, residual_needed, scale_needed, _ = ctx.needs_input_grad
        needs = (x_needed, weight_needed, bias_needed, scale_needed)
        inputs = (grad, x, saved, weight, layer_scale, sample_scale, needs)
        given = iter(registration.call(_bwd, *inputs) if any(needs) else ())
        dx, dweight, dbias, dscale = (next(given) if needed else None for needed in needs)
        return dx, dweight, dbias, grad if residual_needed else None, dscale, None


def decided(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    dtype: torch.dtype,
    frozen: bool,
) -> choices.How:
    """How a forward call on x [B, N, K] runs, but for moments."""
    biases = () if bias is None else (bias,)
    lies = native.as_they_lie(x, (weight,), biases, layer_scale, dtype, frozen)
    return choices.How(dtype, lies, choices.allows_tf32(x))


def forward(
    x, weight, bias, residual, layer_scale, sample_scale, frozen, save, how: choices.How
) -> tuple[Tensor, list[Tensor]]:
    """The registered op in the libraries, as was decided."""
    if not how.as_they_lie:
        biases = () if bias is None else (bias,)
        read = native.product(x, (weight,), biases, layer_scale, how.dtype, frozen)
        weight, bias, layer_scale = read.weights[0], read.bias, read.layer_scale
    given = (x, weight, bias, residual, layer_scale, sample_scale, save)
    return native.ops.linear_residual_fwd(*given, how.with_moments, how.tf32)


def _fwd_kernels(
    x, weight, bias, residual, layer_scale, sample_scale, dtype, frozen, save, with_moments=False
):
    how = decided(x, weight, bias, layer_scale, dtype, frozen)._replace(with_moments=with_moments)
    return forward(x, weight, bias, residual, layer_scale, sample_scale, frozen, save, how)


def _fwd_shapes(
    x, weight, bias, residual, layer_scale, sample_scale, dtype, frozen, save, with_moments=False
):
    out = residual.new_empty(residual.shape)
    saved = native.product_shapes(residual, layer_scale, dtype) if save else []
    return out, saved + native.moments_shapes(residual, with_moments)


def _fwd_autograd(
    x, weight, bias, residual, layer_scale, sample_scale, dtype, frozen, save, with_moments=False
):
    inputs = (x, weight, bias, residual, layer_scale, sample_scale)
    if needs_gradient(*inputs):
        return _recorded(*inputs, dtype, frozen), []
    return registration.below_autograd(_fwd, *inputs, dtype, frozen, save, with_moments)


def _bwd_kernels(grad, x, saved, weight, layer_scale, sample_scale, needs):
    return native.ops.linear_residual_bwd(
        *(grad, x, saved, weight, layer_scale, sample_scale), native.bits(needs), choices.allows_tf32(x)
    )


def _bwd_shapes(grad, x, saved, weight, layer_scale, sample_scale, needs):
    return native.gradient_shapes((x, weight, weight[:, 0], layer_scale), needs)


_fwd = registration.register(
    f"linear_residual_fwd({INPUTS}, ScalarType dtype, bool frozen, bool save, bool with_moments=False) "
    "-> (Tensor, Tensor[])",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
)
_bwd = registration.register(
    "linear_residual_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor weight, Tensor? layer_scale, "
    "Tensor? sample_scale, bool[4] needs) -> Tensor[]",
    _bwd_kernels,
    _bwd_shapes,
)
