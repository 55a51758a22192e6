"""layer_norm_mlp in the compiled libraries: the registered ops, their shapes, and their gradients.

    fastvit::layer_norm_mlp_fwd(x, ..., frozen, save) -> out [B, N, D], and with ``save`` the saved
    fastvit::layer_norm_mlp_bwd(grad, x, saved, ..., needs) -> the gradients that are needed, in order

Saved are the norms' statistics, what entered the activation and, beside LayerScale, fc2's output; all else is
computed again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient
from . import choices, native, registration

OP = "layer_norm_mlp"
INPUTS = f"Tensor x, Tensor? norm_weight, Tensor? norm_bias, {native.MLP_WEIGHTS}"
OPTIONS = "float eps, str activation, str norm"


# Biases that their products have taken in.
NOT_READ = ("fc1_bias", "fc2_bias", "gate_bias")


class Inputs(NamedTuple):
    """The tensors in the op's order."""

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    inner_norm_weight: Tensor | None
    inner_norm_bias: Tensor | None
    layer_scale: Tensor | None
    sample_scale: Tensor | None

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """With the products' weights in ``dtype``, by torch's own op, which has a gradient."""
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate_weight", "gate_bias")
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{name: t.to(dtype) for name, t in given.items() if t is not None})


class Options(NamedTuple):
    """What follows them in the forward op."""

    eps: float
    activation: str
    norm: str
    dtype: torch.dtype
    frozen: bool
    save: bool
    moments: Tensor | None = None
    with_moments: bool = False


def layer_norm_mlp(
    *first: Tensor | None,
    eps: float,
    activation: str,
    norm: str,
    frozen: bool,
    moments: Tensor | None,
    with_moments: bool,
    **rest: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The public op's call; under autocast products are in low precision, and the sum as x is."""
    inputs = Inputs(*first, **rest)
    dtype = compute_dtype(inputs.fc1_weight)
    if registration.records_gradients(*inputs):
        return _recorded(inputs, eps, activation, norm, dtype, frozen), None
    with_moments = with_moments and choices.gives_moments(OP, inputs.x, inputs.fc2_weight.shape[1], dtype)
    options = Options(eps, activation, norm, dtype, frozen, False, moments, with_moments)
    out, given = registration.call(_fwd, *inputs, *options)
    return out, given[0] if given else None


def _recorded(inputs, eps, activation, norm, dtype, frozen):
    if frozen:
        native.release([weight for weight in inputs if weight is not None])
    return Node.apply(eps, activation, norm, *inputs.cast(dtype))


class Node(Function):
    @staticmethod
    def forward(ctx, eps, activation, norm, *tensors):
        inputs = Inputs(*tensors)
        dtype = inputs.fc1_weight.dtype
        out, saved = registration.call(_fwd, *inputs, eps, activation, norm, dtype, False, True)
        ctx.save_for_backward(*inputs._replace(fc1_bias=None, gate_bias=None, fc2_bias=None), *saved)
        ctx.options = (eps, activation, norm)
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad):
        count, kept = len(Inputs._fields), ctx.saved_tensors  # once: a checkpoint gives them once
        inputs, saved = Inputs(*kept[:count]), kept[count:]
        needs = ctx.needs_input_grad[3 : 3 + count - 1]
        given = iter(registration.call(_bwd, grad, saved, *_read_by_bwd(inputs), *ctx.options, needs))
        return None, None, None, *[next(given) if needed else None for needed in needs], None


def _read_by_bwd(inputs: Inputs) -> list[Tensor | None]:
    return [tensor for name, tensor in inputs._asdict().items() if name not in NOT_READ]


def decided(inputs: Inputs, options: Options) -> choices.How:
    """How a forward call runs."""
    x, dtype, frozen = inputs.x, options.dtype, options.frozen
    weights = (inputs.fc1_weight,)
    folds = frozen and options.activation != "swiglu" and choices.folds(OP, x, weights, dtype)
    return choices.How(
        dtype,
        all(native.as_they_lie(x, *product, dtype, frozen) for product in _products(inputs)),
        choices.allows_tf32(x),
        folds,
        choices.fuses(x, inputs.fc1_weight, dtype, "fwd"),
        options.with_moments,
    )


def _products(inputs: Inputs) -> list[tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]]:
    """Weights, biases and LayerScale of fc1 and fc2, and of the gate if it has its own."""
    layers = [
        (inputs.fc1_weight, inputs.fc1_bias, None),
        (inputs.fc2_weight, inputs.fc2_bias, inputs.layer_scale),
        (inputs.gate_weight, inputs.gate_bias, None),
    ]
    given = [layer for layer in layers if layer[0] is not None]
    return [((weight,), () if bias is None else (bias,), scale) for weight, bias, scale in given]


def forward(inputs: Inputs, options: Options, how: choices.How) -> tuple[Tensor, list[Tensor]]:
    """The registered op in the libraries, as was decided."""
    eps, activation, norm, dtype, frozen, save, moments, _ = options
    folded = []
    if how.folds:
        weights, biases, _ = _products(inputs)[0]
        folded = native.folded(inputs.norm_weight, inputs.norm_bias, weights, biases, dtype)
    given = inputs
    if not how.as_they_lie:
        read = [native.product(inputs.x, *product, dtype, frozen) for product in _products(inputs)]
        products = [part for product in read for part in (product.weights[0], product.bias)]
        products += [None] * (6 - len(products))
        given = (*inputs[:3], *products, *inputs[9:11], read[1].layer_scale, inputs.sample_scale)
    given = (*given, eps, activation, norm, folded, moments, save, how.with_moments)
    return native.ops.layer_norm_mlp_fwd(*given, how.fuses, how.tf32)


def _fwd_kernels(*arguments):
    inputs, options = Inputs(*arguments[:13]), Options(*arguments[13:])
    return forward(inputs, options, decided(inputs, options))


def _fwd_shapes(*arguments):
    inputs, options = Inputs(*arguments[:13]), Options(*arguments[13:])
    x, out, norm, dtype = inputs.x, inputs.x.new_empty(inputs.x.shape), options.norm, options.dtype
    moments = native.moments_shapes(x, options.with_moments)
    if not options.save:
        return out, moments
    rows = x.shape[0] * x.shape[1]
    products = [w for w in (inputs.fc1_weight, inputs.gate_weight) if w is not None]
    saved = native.statistics_shapes(x, rows, norm, dtype)
    saved += [x.new_empty((rows, weight.shape[0]), dtype=dtype) for weight in products]
    if inputs.inner_norm_weight is not None:
        saved += native.statistics_shapes(x, rows, norm, dtype)
    return out, saved + native.product_shapes(x, inputs.layer_scale, dtype) + moments


def _fwd_autograd(*arguments):
    inputs, options = Inputs(*arguments[:13]), Options(*arguments[13:])
    if needs_gradient(*inputs):
        return _recorded(inputs, *options[:5]), []
    return registration.below_autograd(_fwd, *arguments)


def _bwd_kernels(grad, saved, x, norm_weight, norm_bias, *rest):
    *weights, eps, activation, norm, needs = rest
    how = choices.fuses(x, weights[0], weights[0].dtype, "bwd"), choices.allows_tf32(x)
    return native.ops.layer_norm_mlp_bwd(
        *(grad, x, saved, norm_weight, norm_bias, *weights, eps, activation, norm, native.bits(needs)), *how
    )


def _bwd_shapes(grad, saved, x, norm_weight, norm_bias, fc1_weight, fc2_weight, gate_weight, *rest):
    inner_norm_weight, inner_norm_bias, layer_scale, _, _, _, _, needs = rest
    gate_bias = None if gate_weight is None else gate_weight[:, 0]
    products = (fc1_weight, fc1_weight[:, 0], fc2_weight, fc2_weight[:, 0], gate_weight, gate_bias)
    inner = (inner_norm_weight, inner_norm_bias)
    return native.gradient_shapes((x, norm_weight, norm_bias, *products, *inner, layer_scale), needs)


_fwd = registration.register(
    f"layer_norm_mlp_fwd({INPUTS}, {OPTIONS}, ScalarType dtype, bool frozen, bool save, "
    "Tensor? moments=None, bool with_moments=False) -> (Tensor, Tensor[])",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
)
_bwd = registration.register(
    "layer_norm_mlp_bwd(Tensor grad, Tensor[] saved, Tensor x, Tensor? norm_weight, Tensor? norm_bias, "
    f"{native.MLP_SAVED_WEIGHTS}, {OPTIONS}, bool[12] needs) -> Tensor[]",
    _bwd_kernels,
    _bwd_shapes,
)
