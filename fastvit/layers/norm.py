"""LayerNorm and RMSNorm with the eps that vision transformers use, and what an op needs to know of them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .plain import is_plain, known, weight_and_bias


@known
class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with timm's defaults and argument names."""

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True, **kwargs) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **kwargs)


@known
class RmsNorm(nn.RMSNorm):
    """nn.RMSNorm with timm's defaults, argument names and class name."""

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True, **kwargs) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=affine, **kwargs)


NORM_LAYERS = {"layernorm": LayerNorm, "rmsnorm": RmsNorm}


def get_norm_layer(norm_layer: str | Callable[..., nn.Module] | None) -> Callable[..., nn.Module] | None:
    """A norm's class from its name ("layernorm", "rms_norm", ...); classes and partials pass through.

    Raises:
        ValueError: for an unknown name.
    """
    if norm_layer is None or norm_layer == "":
        return None
    if not isinstance(norm_layer, str):
        return norm_layer
    name = norm_layer.replace("_", "").lower()
    if name not in NORM_LAYERS:
        raise ValueError(
            f"unknown norm_layer {norm_layer!r}; it must be one of {', '.join(NORM_LAYERS)}, or a class"
        )
    return NORM_LAYERS[name]


class NormArguments(NamedTuple):
    """A norm as the ops take it: the name of the function, weight and bias [D] or None, eps."""

    norm: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def norm_arguments(module: nn.Module) -> NormArguments | None:
    """What the norm computes, or None if only its own forward knows."""
    if is_plain(module, LayerNorm, nn.LayerNorm):
        return NormArguments("layer_norm", *weight_and_bias(module), module.eps)
    if is_plain(module, RmsNorm, nn.RMSNorm) and module.eps is not None:
        return NormArguments("rms_norm", *weight_and_bias(module), module.eps)
    return None
