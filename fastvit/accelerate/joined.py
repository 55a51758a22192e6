"""Weights that other libraries keep apart and our ops read as one, put one below the other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..derived import derived
from ..layers.plain import Unfused, weight_and_bias


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """[a + b + ..., K] from [a, K], [b, K], ...: a copy, kept until one of them changes where no gradient is
    recorded, and else made anew with a gradient of its own.

    Raises:
        Unfused: while torch.fx traces, which would take the copy for a constant.
    """
    if torch.compiler.is_compiling():
        return torch.cat(tuple(tensors))
    if is_fx_symbolic_tracing():
        raise Unfused("its projections are apart, and torch.fx would keep them as they are now")
    return derived("joined", tensors, lambda: torch.cat(tuple(tensors)))


def joined_projections(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers as of one; a bias that one of them lacks is zero."""
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    if all(bias is None for bias in biases):
        return joined(weights), None
    pairs = zip(weights, biases, strict=True)
    return joined(weights), joined(
        [weight.new_zeros(weight.shape[0]) if b is None else b for weight, b in pairs]
    )
