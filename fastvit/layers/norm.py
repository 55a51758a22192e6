"""LayerNorm and RMSNorm with the eps that vision transformers use, and what an op needs to know of them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .plain import Unfused, known, plain_child, weight_and_bias


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

# The ops' name for what a class computes.
NORMS: dict[type[nn.Module], str] = {
    LayerNorm: "layer_norm",
    nn.LayerNorm: "layer_norm",
    RmsNorm: "rms_norm",
    nn.RMSNorm: "rms_norm",
}


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

    def beside(self, weight: Tensor | tuple[Tensor, ...]) -> "NormArguments":
        """Itself, for a product with this weight, or with several of one dtype.

        Raises:
            Unfused: if the dtypes differ; torch's own layers would fail or promote, each in its way.
        """
        dtype = weight.dtype if isinstance(weight, Tensor) else weight[0].dtype
        if self.weight is not None and self.weight.dtype != dtype:
            raise Unfused(f"a norm is in {self.weight.dtype} beside a weight in {dtype}")
        return self


def norm_arguments(parent: nn.Module, name: str) -> NormArguments:
    """What the norm of that name computes.

    Raises:
        Unfused: if only its own forward knows.
    """
    module = plain_child(parent, name, NORMS)
    own = module.__dict__
    eps = own["eps"] if "eps" in own else own["variance_epsilon"]
    if eps is None:
        raise Unfused(f"{name} has no eps of its own")
    dimensions = len(own.get("normalized_shape", (0,)))
    if dimensions != 1:
        raise Unfused(f"{name} is over {dimensions} dimensions")
    # timm's switch for norms in low precision, or in another library.
    if own.get("_fast_norm"):
        raise Unfused(f"{name} is set to timm's fast norm")
    return NormArguments(NORMS[type(module)], *weight_and_bias(module), eps)
