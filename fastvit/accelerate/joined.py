"""Projections that other libraries keep apart and our op reads as one: their weights, where they lie."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..layers.plain import Unfused, weight_and_bias


def joined_projections(
    projections: Sequence[nn.Module],
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of linear layers as `layer_norm_linear` takes them, for outputs side by side.

    Raises:
        Unfused: while torch.fx traces, which would take the parameters for constants.
    """
    if is_fx_symbolic_tracing():
        raise Unfused("its projections are apart, and torch.fx would keep them as they are now")
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    if len({weight.dtype for weight in weights}) > 1:
        raise Unfused("its projections have different dtypes")
    return weights, biases
