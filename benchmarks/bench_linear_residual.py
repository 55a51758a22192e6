"""linear_residual as attention's output projection."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import halves


@dataclass(frozen=True)
class LinearResidual(halves.Half):
    """residual + layer_scale * proj(x)."""

    op = "linear_residual"
    weights: ClassVar = {"weight": (1, 1), "bias": (1,), "layer_scale": (1,)}
    # x, residual and out; x, its gradient and that of out, which is the residual's as well.
    passes: ClassVar = {"fwd": 3, "bwd": 3, "step": 6}

    @property
    def streams(self) -> tuple[str, ...]:
        return ("x", "residual")

    def reference(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor
    ) -> Tensor:
        return residual + layer_scale * F.linear(x, weight, bias)


providers = halves.providers


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[LinearResidual]:
    return (LinearResidual(*size) for size in halves.sizes(device, quick, dtypes))
