"""layer_norm_mlp with exact GELU: `python -m fastvit_benchmarks.bench_layer_norm_mlp [--quick]`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import halves
from .op_bench import Inputs, Provider, Results
from .op_screen import command


@dataclass(frozen=True)
class LayerNormMlp(halves.Half):
    """x + fc2(gelu(fc1(norm(x)))), four times as wide inside."""

    op = "layer_norm_mlp"
    weights: ClassVar = {
        "norm_weight": (1,),
        "norm_bias": (1,),
        "fc1_weight": (4, 1),
        "fc1_bias": (4,),
        "fc2_weight": (1, 4),
        "fc2_bias": (1,),
    }
    # x and out; x, the gradients of out and x, and what entered the activation.
    passes: ClassVar = {"fwd": 2, "bwd": 3 + 4, "step": 5 + 2 * 4}

    def reference(
        self,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
    ) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
        return x + F.linear(F.gelu(F.linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def onednn(case: LayerNormMlp, inputs: Inputs) -> Callable[[], Results]:
    """The best that torch's own ops do on a CPU: products packed by oneDNN, with GELU and sum in them."""
    linear, packed = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    fc1, fc2 = packed(inputs["fc1_weight"]), packed(inputs["fc2_weight"])
    x, norm = inputs["x"], (inputs["norm_weight"], inputs["norm_bias"], 1e-6)

    @torch.no_grad()
    def run() -> Results:
        h = linear(F.layer_norm(x, x.shape[-1:], *norm), fc1, inputs["fc1_bias"], "gelu", [], "none")
        return (linear.binary(h, x, fc2, inputs["fc2_bias"], "add"),)

    return run


def providers(case: LayerNormMlp, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    given, absent = halves.providers(case, device)
    if device.type == "cpu" and case.direction == "fwd":
        given["onednn packed"] = onednn
    return given, absent


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[LayerNormMlp]:
    return (LayerNormMlp(*size) for size in halves.sizes(device, quick, dtypes))


if __name__ == "__main__":
    command(cases, providers)
