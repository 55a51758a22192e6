"""The four ops of a block as one node of autograd.

Each op has a node of its own; to make and to call one takes the CPU longer than a small kernel runs. Where
all four record gradients, one node runs their forwards, and later their backwards: the same numbers, and the
same tensors kept from the one for the other.
"""

from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import attention_triton, layer_norm_linear_native, layer_norm_mlp_native, linear_residual_native
from .registration import once_differentiable

# Of what the node is given: which places are each op's.
_QKV = slice(0, 5)
_VALUES = slice(5, 5 + len(attention_triton.NAMES))
_ENDING = slice(_VALUES.stop, _VALUES.stop + 4)
_MLP = slice(_ENDING.stop, _ENDING.stop + len(layer_norm_mlp_native.Inputs._fields) - 1)
# The weights and biases of products, which are read in the products' dtype.
_CAST = (3, 4, _ENDING.start, _ENDING.start + 1, *range(_MLP.start + 2, _MLP.start + 8))


class Plan(NamedTuple):
    """What the ops take beside tensors; ``dtype`` is that of the products."""

    num_heads: int
    eps: float
    norm: str
    mlp_eps: float
    activation: str
    mlp_norm: str
    dtype: torch.dtype


class _Context:
    """What an op has in the place of its own node: the block's keeps its tensors."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def run(
    plan: Plan,
    qkv: tuple[Tensor | None, ...],
    values: tuple[Any, ...],
    ending: tuple[Tensor | None, ...],
    mlp: tuple[Tensor | None, ...],
) -> Tensor:
    """[B, N, D] from a block's ops, each of which records gradients.

    Args:
        plan: see there.
        qkv: the tokens [B, N, D], the norm's weight and bias, the QKV projection's weight and bias.
        values: those of ``attention_triton.NAMES``.
        ending: the output projection's weight and bias, LayerScale, stochastic depth's factors [B].
        mlp: ``layer_norm_mlp_native.Inputs`` but for the tokens.
    """
    return _Block.apply(plan, *qkv, *values, *ending, *mlp)


class _Block(Function):
    @staticmethod
    def forward(ctx, plan, *given):
        ctx.dtypes = [None if given[place] is None else given[place].dtype for place in _CAST]
        given = list(given)
        for place, dtype in zip(_CAST, ctx.dtypes, strict=True):
            if dtype is not None and dtype != plan.dtype:
                given[place] = given[place].to(plan.dtype)
        first, second, third, fourth = contexts = [_Context() for _ in range(4)]
        x, values, (weight, bias, *scales) = given[0], given[_VALUES], given[_ENDING]
        packed = layer_norm_linear_native.Node.forward(first, *given[_QKV], plan.eps, plan.norm)
        tokens = attention_triton.Packed.forward(second, packed, plan.num_heads, *values)
        x = linear_residual_native.Node.forward(third, tokens, weight, bias, x, *scales)
        how = plan.mlp_eps, plan.activation, plan.mlp_norm
        out = layer_norm_mlp_native.Node.forward(fourth, *how, x, *given[_MLP])
        ctx.save_for_backward(*[tensor for context in contexts for tensor in context.saved_tensors])
        ctx.counts = [len(context.saved_tensors) for context in contexts]
        for context in contexts:
            del context.saved_tensors
        ctx.contexts = contexts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        first, second, third, fourth = contexts = [copy(context) for context in ctx.contexts]
        for context, count in zip(contexts, ctx.counts, strict=True):
            context.saved_tensors = tuple(islice(saved, count))
        needs = ctx.needs_input_grad[1:]
        first.needs_input_grad = (*needs[_QKV], False, False)
        # Of what one op gives to the next a gradient is always needed: the first op records.
        second.needs_input_grad = (True, False, *needs[_VALUES])
        of_weight, of_bias, *of_scales = needs[_ENDING]
        third.needs_input_grad = (True, of_weight, of_bias, needs[0], *of_scales)
        fourth.needs_input_grad = (False, False, False, True, *needs[_MLP])
        _, _, _, grad, *mlp = layer_norm_mlp_native.Node.backward(fourth, grad)
        grad, *ending, beside, layer_scale, _ = linear_residual_native.Node.backward(third, grad)
        grad, _, *values = attention_triton.Packed.backward(second, grad)
        x, *qkv, _, _ = layer_norm_linear_native.Node.backward(first, grad)
        grads = [x if beside is None else x.add_(beside), *qkv, *values, *ending, layer_scale, None, *mlp]
        for place, dtype in zip(_CAST, ctx.dtypes, strict=True):
            if grads[place] is not None:
                grads[place] = grads[place].to(dtype)
        return None, *grads
