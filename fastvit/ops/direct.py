"""The ops' kernels, where everything was decided before: no gradients, and nobody looks on.

``decided`` is what the calls of one kind have decided, by op; the first of them notes it.
"""

from torch import Tensor

from ..call_facts import compute_dtype
from . import (
    attention_triton,
    choices,
    layer_norm_linear_native,
    layer_norm_mlp_native,
    linear_residual_native,
)

Decided = dict[str, choices.How]


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None,
    eps: float,
    norm: str,
    frozen: bool,
    decided: Decided,
) -> Tensor:
    """That of the compiled libraries."""
    op = layer_norm_linear_native
    weights, biases = listed(weight, bias)
    if (how := decided.get(op.OP)) is None:
        how = decided[op.OP] = op.decided(x, weights, biases, compute_dtype(weights[0]), frozen)
    inputs = (x, norm_weight, norm_bias, weights, biases)
    return op.forward(*inputs, eps, norm, False, frozen, None, how)[0]


def listed(
    weight: Tensor | tuple[Tensor, ...], bias: Tensor | tuple[Tensor | None, ...] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """One weight or several, as the ops take them: with a bias for each, or none."""
    if isinstance(weight, Tensor):
        return [weight], [] if bias is None else [bias]
    return list(weight), layer_norm_linear_native.given_biases(weight, bias)


def attention(
    qkv: Tensor, num_heads: int, scale: float | None, qk_norm: dict | None, options: dict
) -> Tensor:
    """That of the Triton kernels, on packed qkv [B, N, 3 * H * d]; none of them is for causal attention."""
    given = {name: value for name, value in options.items() if value is not None and name != "is_causal"}
    return attention_triton.packed(qkv, num_heads, scale, {**qk_norm, **given} if qk_norm else given)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    frozen: bool,
    decided: Decided,
) -> tuple[Tensor, Tensor | None]:
    """That of the compiled libraries, and the moments of the result where they are worth it."""
    op = linear_residual_native
    if (how := decided.get(op.OP)) is None:
        dtype = compute_dtype(weight)
        with_moments = frozen and choices.gives_moments(op.OP, residual, x.shape[-1], dtype)
        how = op.decided(x, weight, bias, layer_scale, dtype, frozen)
        how = decided[op.OP] = how._replace(with_moments=with_moments)
    inputs = (x, weight, bias, residual, layer_scale, None)
    out, moments = op.forward(*inputs, frozen, False, how)
    return out, moments[0] if moments else None


def layer_norm_mlp(
    x: Tensor,
    arguments: dict,
    layer_scale: Tensor | None,
    frozen: bool,
    moments: Tensor | None,
    decided: Decided,
) -> Tensor:
    """That of the compiled libraries; ``arguments`` are the public op's."""
    op, inputs = layer_norm_mlp_native, mlp_inputs(x, arguments, layer_scale, None)
    eps, activation, norm = arguments["eps"], arguments["activation"], arguments["norm"]
    how = decided.get(op.OP)
    dtype = compute_dtype(inputs.fc1_weight) if how is None else how.dtype
    options = op.Options(eps, activation, norm, dtype, frozen, False, moments)
    if how is None:
        how = decided[op.OP] = op.decided(inputs, options)
    return op.forward(inputs, options, how)[0]


def mlp_inputs(
    x: Tensor, arguments: dict, layer_scale: Tensor | None, sample_scale: Tensor | None
) -> layer_norm_mlp_native.Inputs:
    """The tensors of the op, of the public op's arguments."""
    return layer_norm_mlp_native.Inputs(
        x,
        arguments["norm_weight"],
        arguments["norm_bias"],
        arguments["fc1_weight"],
        arguments["fc1_bias"],
        arguments["fc2_weight"],
        arguments["fc2_bias"],
        arguments.get("gate_weight"),
        arguments.get("gate_bias"),
        arguments.get("inner_norm_weight"),
        arguments.get("inner_norm_bias"),
        layer_scale,
        sample_scale,
    )
