"""layer_norm_linear as a block's QKV projection."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import halves


@dataclass(frozen=True)
class LayerNormLinear(halves.Half):
    """qkv(norm(x)), three times as wide."""

    op = "layer_norm_linear"
    weights: ClassVar = {"norm_weight": (1,), "norm_bias": (1,), "weight": (3, 1), "bias": (3,)}
    # x and qkv; x, its gradient and that of qkv.
    passes: ClassVar = {"fwd": 1 + 3, "bwd": 2 + 3, "step": 3 + 6}

    @property
    def out_width(self) -> int:
        return 3 * self.width

    def reference(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), weight, bias)


providers = halves.providers


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[LayerNormLinear]:
    return (LayerNormLinear(*size) for size in halves.sizes(device, quick, dtypes))
