"""The second half of attention: output projection, LayerScale, stochastic depth, residual."""

import torch.nn.functional as F
from torch import Tensor


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """residual + sample_scale * layer_scale * linear(x).

    Args:
        x: [B, N, K], floating.
        weight: [D, K], Linear's layout.
        bias: [D] or None.
        residual: [B, N, D].
        layer_scale: [D] or None, LayerScale (arXiv 2103.17239).
        sample_scale: [B] or None, one factor a sample: stochastic depth (arXiv 1603.09382) with its
            survivors divided by the keep probability.

    Returns:
        [B, N, D], contiguous.
    """
    return add_scaled(residual, F.linear(x, weight, bias), layer_scale, sample_scale)


def add_scaled(
    residual: Tensor, y: Tensor, layer_scale: Tensor | None, sample_scale: Tensor | None
) -> Tensor:
    """residual + sample_scale * layer_scale * y, contiguous: the end of both halves of a block."""
    if layer_scale is not None:
        y = y * layer_scale
    if sample_scale is not None:
        y = y * sample_scale.view(-1, *[1] * (y.ndim - 1))
    return (residual + y).contiguous()
