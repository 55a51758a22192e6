"""How a module was told to run, by `accelerate` and `fold_normalize`: kept on it, copied and pickled."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import use_backend_here
from ..ops.patch_embed import constant
from ..reference.patch_embed import to_unit_range

ATTRIBUTE = "_fastvit"


class Settings(NamedTuple):
    """``frozen``: weights are frozen, and ops may keep copies of them; ``reference_ops`` run as torch's own.

    With ``checkpoint`` "mlp" what MLPs save is computed again in backward; with ``subset`` what stochastic
    depth drops is not computed.
    With ``mean`` and ``std`` images come as uint8, or as floats in 0..1, and are normalised inside.
    """

    frozen: bool = False
    reference_ops: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    checkpoint: str | None = None
    subset: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "Settings":
        """Those of the module, by default where it was told nothing: fastvit's own."""
        return module.__dict__.get(ATTRIBUTE, _DEFAULT)

    def context(self) -> Any:
        """In which the ops run."""
        if not self.reference_ops:
            return nullcontext()
        return use_backend_here(**dict.fromkeys(self.reference_ops, "reference"))

    def normalized(self, images: Tensor, embed: nn.Module) -> Tensor:
        """Images as this embedding takes them, whose forward does not normalise."""
        if self.mean is None:
            return images
        unit = to_unit_range(images, _dtype(embed)) if images.dtype == torch.uint8 else images
        return (unit - _column(self.mean, unit)) / _column(self.std, unit)


_DEFAULT = Settings()


def _dtype(embed: nn.Module) -> torch.dtype:
    """That of its first weight: not by ``parameters()``, of which nn.DataParallel and FSDP leave none."""
    weights = (getattr(module, "weight", None) for module in embed.modules())
    dtypes = (w.dtype for w in weights if isinstance(w, Tensor) and w.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return constant(tuple(values), like.dtype, like.device)[:, None, None]
