"""The ops' kernels, where everything was decided before: no gradients, no casts, nobody looks on."""

from torch import Tensor

from . import layer_norm_linear_native, layer_norm_mlp_native, linear_residual_native, native


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None,
    eps: float,
    norm: str,
    frozen: bool,
) -> Tensor:
    """That of the compiled libraries."""
    if isinstance(weight, Tensor):
        weights, biases = [weight], [] if bias is None else [bias]
    else:
        weights, biases = weight, layer_norm_linear_native.given_biases(weight, bias)
    inputs = (x, norm_weight, norm_bias, weights, biases)
    return layer_norm_linear_native._fwd_kernels(*inputs, eps, norm, weights[0].dtype, False, frozen)[0]


def attention(qkv: Tensor, num_heads: int, scale: float | None, qk_norm: dict | None) -> Tensor:
    """That of the Triton kernels, on packed qkv [B, N, 3 * H * d], with norms of q and k at most."""
    from .attention_triton import packed

    return packed(qkv, num_heads, scale, qk_norm or {})


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    frozen: bool,
) -> tuple[Tensor, Tensor | None]:
    """That of the compiled libraries, and the moments of the result where they are worth it."""
    inputs = (x, weight, bias, residual, layer_scale, None)
    op, dtype = linear_residual_native.OP, weight.dtype
    with_moments = frozen and native.gives_moments(op, residual, x.shape[-1], dtype)
    out, moments = linear_residual_native._fwd_kernels(*inputs, dtype, frozen, False, with_moments)
    return out, moments[0] if moments else None


def layer_norm_mlp(
    x: Tensor, arguments: dict, layer_scale: Tensor | None, frozen: bool, moments: Tensor | None
) -> Tensor:
    """That of the compiled libraries; ``arguments`` are the public op's."""
    inputs = layer_norm_mlp_native.Inputs(
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
        None,
    )
    eps, activation, norm = arguments["eps"], arguments["activation"], arguments["norm"]
    how = (eps, activation, norm, inputs.fc1_weight.dtype, frozen, False, moments)
    return layer_norm_mlp_native._fwd_kernels(*inputs, *how)[0]
