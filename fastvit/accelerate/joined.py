"""Projections that other libraries keep apart and our op reads as one: their weights, where they lie."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.plain import Unfused, weight_and_bias


def joined_projections(
    projections: Sequence[nn.Module],
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of linear layers as `layer_norm_linear` takes them, for outputs side by side.

    Raises:
        Unfused: if their dtypes differ.
    """
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    if len({weight.dtype for weight in weights}) > 1:
        raise Unfused("its projections have different dtypes")
    return weights, biases
