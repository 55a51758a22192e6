"""The MLP half of a block: norm2, fc1, activation, fc2, LayerScale, stochastic depth, residual."""

import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, GATED
from .linear_residual import add_scaled
from .normalization import normalize


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    norm: str = "layer_norm",
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    inner_norm_weight: Tensor | None = None,
    inner_norm_bias: Tensor | None = None,
) -> Tensor:
    """x + sample_scale * layer_scale * fc2(inner_norm(act(fc1(norm(x))))).

    Args:
        x: [B, N, D], floating; it is the residual too.
        norm_weight, norm_bias: [D] or None.
        fc1_weight: [M, D], Linear's layout; [2M, D] with the gate's half first for packed "swiglu".
        fc1_bias: [M] (or [2M]) or None.
        fc2_weight: [D, M].
        fc2_bias: [D] or None.
        eps: of the norm, and of the inner norm.
        activation: "gelu" (exact, erf), "gelu_tanh", "quick_gelu", "silu", "relu", or "swiglu"
            (silu(gate) * value, arXiv 2002.05202).
        norm: "layer_norm" or "rms_norm", for both norms.
        layer_scale: [D] or None (arXiv 2103.17239).
        sample_scale: [B] or None: stochastic depth, one factor a sample (arXiv 1603.09382).
        gate_weight, gate_bias: [M, D] and [M]: "swiglu" with a gate of its own.
        inner_norm_weight, inner_norm_bias: [M]: a norm between activation and fc2 (as EVA-02 and BEiT-3).

    Returns:
        [B, N, D], contiguous.

    Raises:
        ValueError: for an unknown activation, or a gate where the activation has none.
    """
    h = normalize(x, norm_weight, norm_bias, eps, norm)
    gate = F.linear(h, gate_weight, gate_bias) if gate_weight is not None else None
    h = F.linear(h, fc1_weight, fc1_bias)  # the normalised tokens are free from here on
    h = _activate(h, gate, activation)
    if inner_norm_weight is not None:
        h = normalize(h, inner_norm_weight, inner_norm_bias, eps, norm)
    return add_scaled(x, F.linear(h, fc2_weight, fc2_bias), layer_scale, sample_scale)


def _activate(value: Tensor, gate: Tensor | None, name: str) -> Tensor:
    if name in GATED:
        if gate is None:
            gate, value = value.chunk(2, dim=-1)
        return GATED[name](gate) * value
    if gate is not None:
        raise ValueError(f"activation {name!r} has no gate; pass gate_weight only with {', '.join(GATED)}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; it must be one of {', '.join([*ACTIVATIONS, *GATED])}")
    return ACTIVATIONS[name](value)
