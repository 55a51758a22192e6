"""The two halves of a pre-norm transformer block, each as calls of the fused ops on its parameters.

What a half computes with is gathered from the modules first, which raises Unfused where a module inside is to
run its own forward; nothing has been computed then.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..call_facts import transformed
from .norm import NormArguments
from .regularization import drops, sample_scale
from .settings import Settings


class Branch(NamedTuple):
    """How a half ends: what its branch is multiplied with before it is added to the tokens.

    ``frozen`` says that weights are frozen: where no gradient is recorded the ops may keep copies of them.
    ``factor`` is one for all samples, in the place of stochastic depth's own.
    """

    layer_scale: Tensor | None = None
    drop_path: nn.Module | None = None
    frozen: bool = False
    factor: float | None = None

    def arguments(self, x: Tensor) -> dict:
        """The ops' arguments; stochastic depth is drawn here."""
        if self.factor is not None:
            scale = x.new_full((x.shape[0],), self.factor)
        else:
            scale = sample_scale(self.drop_path, x)
        return {"layer_scale": self.layer_scale, "sample_scale": scale, "frozen": self.frozen}


class AttentionHalf(NamedTuple):
    """x + branch(projection(attend(qkv(norm(x))))): weights are [out, in], biases [out] or None.

    ``qkv_weight`` and ``qkv_bias`` are of one projection, or tuples of those of q, k and v.
    """

    norm: NormArguments
    qkv_weight: Tensor | tuple[Tensor, ...]
    qkv_bias: Tensor | tuple[Tensor | None, ...] | None
    attend: Callable[..., Tensor]
    proj_weight: Tensor
    proj_bias: Tensor | None
    branch: Branch

    def __call__(self, x: Tensor, **options) -> Tensor:
        """[B, N, D] to [B, N, D]; ``options`` go to ``attend``, behind the packed [B, N, 3 * H * d]."""
        norm, weight = self.norm, self.qkv_weight
        given = {"eps": norm.eps, "norm": norm.norm, "frozen": self.branch.frozen, "validate": False}
        packed = ops.layer_norm_linear(x, norm.weight, norm.bias, weight, self.qkv_bias, **given)
        tokens = self.attend(packed, **options)
        branch = self.branch.arguments(x)
        ending = (tokens, self.proj_weight, self.proj_bias, x)
        if not _may_hand_on(x, self.branch):
            return ops.linear_residual(*ending, **branch, validate=False)
        out, moments = ops.linear_residual(*ending, **branch, with_moments=True, validate=False)
        _between.handed = None if moments is None else (weakref.ref(out), _version(out), moments)
        return out


class MlpHalf(NamedTuple):
    """x + branch(MLP(norm(x))): ``arguments`` of `layer_norm_mlp`."""

    arguments: dict
    branch: Branch

    def __call__(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        handed = {} if (moments := _handed_on(x)) is None else {"moments": moments}
        branch = self.branch.arguments(x)
        return ops.layer_norm_mlp(x, **self.arguments, **branch, **handed, validate=False)


# The moments of its tokens that the attention half of a block leaves for the MLP half, which runs next. They
# do not go from one block to the next, between which a hook may write to tokens past what torch records.
_between = threading.local()


def _may_hand_on(x: Tensor, branch: Branch) -> bool:
    plain = type(x) is Tensor and not torch.compiler.is_compiling()
    return branch.frozen and plain and not torch.is_grad_enabled()


def _handed_on(x: Tensor) -> Tensor | None:
    """The moments of these very tokens, if they were handed on and nothing was written to them since."""
    if torch.compiler.is_compiling() or (handed := getattr(_between, "handed", None)) is None:
        return None
    _between.handed = None
    tokens, version, moments = handed
    return moments if tokens() is x and version == _version(x) else None


def _version(x: Tensor) -> int | None:
    """How often it was written to, of which torch keeps no count in inference mode."""
    return None if x.is_inference() else x._version


def run_attention(x: Tensor, half: AttentionHalf, settings: Settings, **options) -> Tensor:
    """The attention half, on the samples that stochastic depth keeps if the settings have it so."""
    if settings.subset and drops(half.branch.drop_path):
        return _on_subset(x, half, options)
    return half(x, **options)


def run_mlp(x: Tensor, half: Callable[[Tensor], Tensor], settings: Settings) -> Tensor:
    """The MLP half, likewise; with ``checkpoint="mlp"`` what it saves is computed again in backward."""
    if settings.subset and drops(half.branch.drop_path):
        half = partial(_on_subset, half=half, options={})
    # torch.func has no checkpoints.
    if settings.checkpoint == "mlp" and torch.is_grad_enabled() and not transformed():
        return checkpoint(half, x, use_reentrant=False)
    return half(x)


def _on_subset(x: Tensor, half: AttentionHalf | MlpHalf, options: dict) -> Tensor:
    """Stochastic depth that does not compute what it drops, as DINOv2 has it (arXiv 2304.07193).

    A fixed number of samples goes through the half, scaled up by the share that does not; the others pass by.
    """
    batch = x.shape[0]
    kept = max(1, int(batch * (1.0 - half.branch.drop_path.drop_prob)))
    chosen = torch.randperm(batch, device=x.device)[:kept]
    options = {name: _chosen(value, chosen, batch) for name, value in options.items()}
    branch = half.branch._replace(drop_path=None, factor=batch / kept)
    return x.index_copy(0, chosen, half._replace(branch=branch)(x[chosen], **options))


def _chosen(value: Any, samples: Tensor, batch: int) -> Any:
    """Of masks and rotary tables that are a sample's own, [B, ...], those of these samples."""
    own = isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == batch
    return value[samples] if own else value
