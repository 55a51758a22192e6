"""Activation modules by name, and the name of an activation module."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.activations import ACTIVATIONS, quick_gelu
from .plain import known, plain_child


@known
class GELUTanh(nn.Module):
    """GELU by the tanh approximation (arXiv 1606.08415), as SigLIP's larger towers were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


@known
class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


# The first are known to the ops; with any other, the MLP runs module by module.
ACT_LAYERS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "celu": nn.CELU,
    "elu": nn.ELU,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def get_act_layer(act_layer: str | Callable[..., nn.Module] | None) -> Callable[..., nn.Module] | None:
    """An activation's class from its name; classes pass through.

    Raises:
        ValueError: for an unknown name.
    """
    if act_layer is None or act_layer == "":
        return None
    if not isinstance(act_layer, str):
        return act_layer
    if act_layer not in ACT_LAYERS:
        raise ValueError(
            f"unknown act_layer {act_layer!r}; it must be one of {', '.join(ACT_LAYERS)}, or a class"
        )
    return ACT_LAYERS[act_layer]


# The ops' name for what a class computes; nn.GELU asks its own argument.
ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    layer: name for name, layer in reversed(ACT_LAYERS.items()) if name in ACTIVATIONS
}


def activation_name(parent: nn.Module, child: str = "act") -> str:
    """The ops' name for the activation of that name.

    Raises:
        Unfused: if only its own forward knows.
    """
    module = plain_child(parent, child, ACTIVATION_NAMES)
    name = ACTIVATION_NAMES[type(module)]
    return "gelu_tanh" if name == "gelu" and getattr(module, "approximate", "none") == "tanh" else name
