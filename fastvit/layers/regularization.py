"""LayerScale, stochastic depth and patch dropout."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .plain import known, plain_child


@known
class LayerScale(nn.Module):
    """x * gamma, one learned factor a channel (arXiv 2103.17239)."""

    def __init__(
        self, dim: int, init_values: float = 1e-5, inplace: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


@known
class DropPath(nn.Module):
    """Stochastic depth, one draw a sample (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        scale = sample_scale(self, x)
        return x if scale is None else x * scale.view((x.shape[0],) + (1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


# LayerScale's factor is its `gamma` or `weight`, whichever the class has.
LAYER_SCALES: dict[type[nn.Module], str | None] = {LayerScale: "gamma", nn.Identity: None}
# By how they draw: the factors [B] of a training step, from the module and the tokens.
DROP_PATHS: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor] | None] = {nn.Identity: None}


def layer_scale(parent: nn.Module, name: str) -> Tensor | None:
    """[D], or None for an Identity.

    Raises:
        Unfused: if the child of that name is neither.
    """
    child = plain_child(parent, name, LAYER_SCALES)
    factor = LAYER_SCALES[type(child)]
    return None if factor is None else getattr(child, factor)


def sample_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """[B]: 0 for a dropped sample, 1 / keep probability for a kept one; None where nothing is dropped."""
    return DROP_PATHS[type(drop_path)](drop_path, x) if drops(drop_path) else None


def drops(drop_path: nn.Module | None) -> bool:
    """Whether stochastic depth is at work."""
    if drop_path is None or type(drop_path) is nn.Identity or not drop_path.training:
        return False
    return bool(drop_path.drop_prob)


def bernoulli_scale(drop_path: nn.Module, x: Tensor) -> Tensor:
    """As timm draws them."""
    keep = 1.0 - drop_path.drop_prob
    scale = x.new_empty(x.shape[0]).bernoulli_(keep)
    return scale.div_(keep) if getattr(drop_path, "scale_by_keep", True) and keep > 0.0 else scale


DROP_PATHS[DropPath] = bernoulli_scale


class PatchDropout(nn.Module):
    """Train on a random subset of the patch tokens; prefix tokens stay (arXiv 2212.00794)."""

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"patch_drop_rate is {prob}; it must be at least 0 and below 1")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, num_patches, dim = patches.shape
        num_kept = max(1, int(num_patches * (1.0 - self.prob)))
        kept = torch.randn(batch, num_patches, device=x.device).argsort(dim=-1)[:, :num_kept]
        if self.ordered:
            kept = kept.sort(dim=-1).values
        patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, dim))
        return torch.cat([prefix, patches], dim=1)
