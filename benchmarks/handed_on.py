"""Attention's projection and the MLP after it, whose norm may have the moments that the projection leaves."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastvit import ops, use_backend
from fastvit.ops import choices

from .bench_layer_norm_mlp import LayerNormMlp
from .bench_linear_residual import LinearResidual
from .op_bench import Provider, differentiated


@dataclass(frozen=True)
class HandedOn(LinearResidual):
    """mlp(residual + layer_scale * proj(x)), forward."""

    weights: ClassVar = LinearResidual.weights | LayerNormMlp.weights
    passes: ClassVar = {"fwd": LinearResidual.passes["fwd"] + LayerNormMlp.passes["fwd"]}

    def reference(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor, **mlp: Tensor
    ) -> Tensor:
        tokens = super().reference(x, residual, weight, bias, layer_scale)
        return LayerNormMlp.reference(self, tokens, **mlp)


def handing_on(on: bool) -> Provider:
    """Both ops of the CUDA library with frozen weights, the norm folded into fc1: by moments or by a pass."""

    def forward(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor, **mlp: Tensor
    ) -> Tensor:
        with use_backend("cuda"), choices.fusing(True), choices.folding(True), choices.giving_moments(on):
            scaled = {"layer_scale": layer_scale, "frozen": True}
            tokens, moments = ops.linear_residual(x, weight, bias, residual, **scaled, with_moments=True)
            return ops.layer_norm_mlp(tokens, **mlp, moments=moments, frozen=True)

    return differentiated(forward)
