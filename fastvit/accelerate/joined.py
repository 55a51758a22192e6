"""Weights that other libraries keep apart and our ops read as one, put one below the other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..derived import derived
from ..layers.plain import Unfused, weight_and_bias


def joined(tensors: Sequence[Tensor | None], sizes: tuple[int, ...] = ()) -> Tensor:
    """[a + b + ..., K] from [a, K], [b, K], ...: a copy, kept until one of them changes where no gradient is
    recorded, and else made anew with a gradient of its own. None stands for zeros, of its size in ``sizes``.

    Raises:
        Unfused: while torch.fx traces, which would take the copy for a constant.
    """
    present = [tensor for tensor in tensors if tensor is not None]

    def join() -> Tensor:
        like = present[0]
        return torch.cat([like.new_zeros(sizes[i]) if t is None else t for i, t in enumerate(tensors)])

    if torch.compiler.is_compiling():
        return join()
    if is_fx_symbolic_tracing():
        raise Unfused("its projections are apart, and torch.fx would keep them as they are now")
    # Of the tensors that are there alone: zeros that are made anew would never be known again.
    places = tuple(tensor is not None for tensor in tensors)
    return derived(("joined", places, sizes), present, join)


def joined_projections(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers as of one; a bias that one of them lacks is zero."""
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    if all(bias is None for bias in biases):
        return joined(weights), None
    return joined(weights), joined(biases, tuple(weight.shape[0] for weight in weights))
