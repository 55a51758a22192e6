"""layer_norm_mlp with exact GELU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops import choices

from . import halves
from .op_bench import Inputs, Provider, Results, differentiated


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


def tanh_epilogue(case: LayerNormMlp, inputs: Inputs) -> Callable[[], Results]:
    """What a GPU's library has in an epilogue, which is the tanh form of GELU: right in bfloat16 at most."""
    fc1, fc2 = inputs["fc1_weight"].T, inputs["fc2_weight"].T
    x, norm = inputs["x"], (inputs["norm_weight"], inputs["norm_bias"], 1e-6)

    @torch.no_grad()
    def run() -> Results:
        h = F.layer_norm(x, x.shape[-1:], *norm).flatten(0, 1)
        a = torch._addmm_activation(inputs["fc1_bias"], h, fc1, use_gelu=True)
        return (x + torch.addmm(inputs["fc2_bias"], a, fc2).view_as(x),)

    return run


def with_fc1(provider: Provider, fused: bool, folded: bool = False) -> Provider:
    """The same with GELU in fc1's epilogue, if the library has a kernel for it, or in a pass of its own.

    With ``folded`` the norm is there too, and its weight in a copy of fc1's.
    """

    def prepare(case: LayerNormMlp, inputs: Inputs) -> Callable[[], Results]:
        with choices.fusing(fused), choices.folding(folded):
            run = provider(case, inputs)
        return choices.folding(folded)(choices.fusing(fused)(run))

    return prepare


def providers(case: LayerNormMlp, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    given, absent = halves.providers(case, device)
    if device.type == "cuda":
        library = differentiated(halves.on_backend(case, "cuda"))
        given |= {"fastvit cuda": with_fc1(library, False), "fastvit cuda, fused": with_fc1(library, True)}
        if case.direction == "fwd" and case.dtype in ("bfloat16", "float16"):
            given["fastvit cuda, folded"] = with_fc1(library, True, folded=True)
            given["cublaslt, tanh"] = tanh_epilogue
    if device.type == "cpu" and case.direction == "fwd":
        given["onednn packed"] = onednn
    return given, absent


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[LayerNormMlp]:
    return (LayerNormMlp(*size) for size in halves.sizes(device, quick, dtypes))
