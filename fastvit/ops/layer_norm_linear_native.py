"""layer_norm_linear in the compiled libraries: the registered ops, their shapes, and their gradients."""

from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient
from . import native, registration

INPUTS = "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias"


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    norm: str,
    fold: bool,
) -> Tensor:
    """The public op's call; under autocast the product is in low precision and the norm in float32."""
    dtype = compute_dtype(weight)
    if registration.records_gradients(x, norm_weight, norm_bias, weight, bias):
        cast = (weight.to(dtype), None if bias is None else bias.to(dtype))
        return _LayerNormLinear.apply(x, norm_weight, norm_bias, *cast, eps, norm)
    inputs = (x, norm_weight, norm_bias, weight, bias)
    return registration.call(_fwd, *inputs, eps, norm, dtype, True, False, fold)[0]


class _LayerNormLinear(Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, norm):
        inputs = (x, norm_weight, norm_bias, weight, bias)
        out, saved = registration.call(_fwd, *inputs, eps, norm, weight.dtype, False, True, False)
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


def _fwd_kernels(x, norm_weight, norm_bias, weight, bias, eps, norm, dtype, keep, save, fold=False):
    folded = []
    if keep and fold and native.folds("layer_norm_linear", x, weight, dtype):
        folded = native.folded(norm_weight, norm_bias, weight, bias, dtype)
    weight, bias, _ = native.weights(x, weight, bias, None, dtype, keep)
    return native.ops.layer_norm_linear_fwd(
        x, norm_weight, norm_bias, weight, bias, eps, norm, folded, save, native.allows_tf32(x)
    )


def _fwd_shapes(x, norm_weight, norm_bias, weight, bias, eps, norm, dtype, keep, save, fold=False):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    return out, native.statistics_shapes(x, x.shape[0] * x.shape[1], norm, dtype) if save else []


def _fwd_autograd(x, norm_weight, norm_bias, weight, bias, eps, norm, dtype, keep, save, fold=False):
    inputs = (x, norm_weight, norm_bias, weight, bias)
    if needs_gradient(*inputs):
        cast = (weight.to(dtype), None if bias is None else bias.to(dtype))
        return _LayerNormLinear.apply(x, norm_weight, norm_bias, *cast, eps, norm), []
    return registration.below_autograd(_fwd, *inputs, eps, norm, dtype, keep, save, fold)


def _bwd_kernels(grad, x, saved, norm_weight, norm_bias, weight, eps, norm, needs):
    return native.ops.layer_norm_linear_bwd(
        *(grad, x, saved, norm_weight, norm_bias, weight, eps, norm),
        *(native.bits(needs), native.allows_tf32(x)),
    )


def _bwd_shapes(grad, x, saved, norm_weight, norm_bias, weight, eps, norm, needs):
    return native.gradient_shapes((x, norm_weight, norm_bias, weight, weight[:, 0]), needs)


_fwd = registration.register(
    f"layer_norm_linear_fwd({INPUTS}, float eps, str norm, ScalarType dtype, bool keep, bool save, "
    "bool fold=False) -> (Tensor, Tensor[])",
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
