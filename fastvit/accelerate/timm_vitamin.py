"""timm's ViTamin: the MLP of its blocks has a norm of its own and a gate of GELU, which is two of the ops."""

from typing import NamedTuple

from timm.models import vitamin
from torch import Tensor, nn

from .. import ops
from ..asking import is_asking
from ..layers.activation import activation_name
from ..layers.halves import Branch
from ..layers.norm import NORMS, NormArguments, norm_arguments
from ..layers.plain import LINEARS, idle_child, known, plain_child, weight_and_bias
from ..layers.regularization import DROP_PATHS, layer_scale
from . import timm_vit
from .joined import joined_projections


class GeGluHalf(NamedTuple):
    """x + branch(fc2(act(gate) * value)), gate and value of norm(outer_norm(x)) by one joined projection.

    ``outer_norm`` and ``act`` are plain modules: calling them calls nothing else.
    """

    outer_norm: nn.Module
    norm: NormArguments
    weight: Tensor
    bias: Tensor | None
    act: nn.Module
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    branch: Branch

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        norm = self.norm
        given = {"eps": norm.eps, "norm": norm.norm, "validate": False}
        asking = is_asking()  # which calls no module
        h = x if asking else self.outer_norm(x)
        h = ops.layer_norm_linear(h, norm.weight, norm.bias, self.weight, self.bias, **given)
        gate, value = h.chunk(2, dim=-1)
        h = value if asking else self.act(gate) * value
        branch = self.branch.arguments(x)
        return ops.linear_residual(h, self.fc2_weight, self.fc2_bias, x, **branch, validate=False)


def geglu_half(block: nn.Module, frozen: bool) -> GeGluHalf:
    """The MLP's half of a ViTamin's block.

    Raises:
        Unfused: if a part is to run its own forward.
    """
    outer_norm = plain_child(block, "norm2", NORMS)
    mlp = plain_child(block, "mlp", (vitamin.GeGluMlp,))
    activation_name(mlp)
    idle_child(mlp, "drop1")
    idle_child(mlp, "drop2")
    weight, bias = joined_projections([plain_child(mlp, name, LINEARS) for name in ("w0", "w1")])
    fc2 = weight_and_bias(plain_child(mlp, "w2", LINEARS))
    norm = norm_arguments(mlp, "norm").beside(weight)
    branch = Branch(layer_scale(block, "ls2"), plain_child(block, "drop_path2", DROP_PATHS), frozen)
    return GeGluHalf(outer_norm, norm, weight, bias, mlp.act, *fc2, branch)


timm_vit.MLP_HALVES[known(vitamin.GeGluMlp)] = geglu_half
