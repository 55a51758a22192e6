"""The two halves of a pre-norm transformer block, each as calls of the fused ops on its parameters.

What a half computes with is gathered from the modules first, which raises Unfused where a module inside is to
run its own forward; nothing has been computed then.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .. import ops
from .norm import NormArguments
from .regularization import sample_scale


class Branch(NamedTuple):
    """How a half ends: what its branch is multiplied with before it is added to the tokens.

    ``fold`` allows LayerScale to be multiplied into a copy of the weight where no gradient is recorded.
    """

    layer_scale: Tensor | None = None
    drop_path: nn.Module | None = None
    fold: bool = True

    def arguments(self, x: Tensor) -> dict:
        """The ops' arguments; stochastic depth is drawn here."""
        scale = sample_scale(self.drop_path, x)
        return {"layer_scale": self.layer_scale, "sample_scale": scale, "fold": self.fold}


class AttentionHalf(NamedTuple):
    """x + branch(projection(attend(qkv(norm(x))))): weights are [out, in], biases [out] or None."""

    norm: NormArguments
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    attend: Callable[..., Tensor]
    proj_weight: Tensor
    proj_bias: Tensor | None
    branch: Branch

    def __call__(self, x: Tensor, **options) -> Tensor:
        """[B, N, D] to [B, N, D]; ``options`` go to ``attend``, behind the packed [B, N, 3 * H * d]."""
        norm, weight = self.norm, self.qkv_weight
        given = {"eps": norm.eps, "norm": norm.norm, "validate": False}
        packed = ops.layer_norm_linear(x, norm.weight, norm.bias, weight, self.qkv_bias, **given)
        tokens = self.attend(packed, **options)
        branch = self.branch.arguments(x)
        return ops.linear_residual(tokens, self.proj_weight, self.proj_bias, x, **branch, validate=False)


class MlpHalf(NamedTuple):
    """x + branch(MLP(norm(x))): ``arguments`` of `layer_norm_mlp`."""

    arguments: dict
    branch: Branch

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return ops.layer_norm_mlp(x, **self.arguments, **self.branch.arguments(x), validate=False)
