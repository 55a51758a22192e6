"""timm's models beside fastvit's: the same arguments, the same weights."""

import functools
import inspect
from typing import Any

import timm
from timm.models import vision_transformer
from torch import nn

from fastvit.layers import GluMlp, SwiGLU
from fastvit.layers.norm import LayerNorm, RmsNorm
from fastvit.verification import randomize
from fastvit.vit import VisionTransformer

# timm's classes by ours: fastvit takes classes too, but only its own have ops behind them.
OURS = {
    timm.layers.LayerNorm: LayerNorm,
    timm.layers.RmsNorm: RmsNorm,
    timm.layers.GluMlp: GluMlp,
    timm.layers.SwiGLU: SwiGLU,
}


def translate(value: Any) -> Any:
    """timm's classes, also within partials, as fastvit's."""
    if isinstance(value, functools.partial):
        return functools.partial(translate(value.func), *value.args, **value.keywords)
    return OURS.get(value, value) if inspect.isclass(value) else value


def constructor_arguments(name: str) -> dict[str, Any]:
    """What timm's registry passes to its VisionTransformer for an architecture, with fastvit's classes."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def spy(self, **arguments):
        seen.update(arguments)
        raise Stop

    original = vision_transformer.VisionTransformer.__init__
    vision_transformer.VisionTransformer.__init__ = spy
    try:
        timm.create_model(name)
    except Stop:
        pass
    finally:
        vision_transformer.VisionTransformer.__init__ = original
    return {key: translate(value) for key, value in seen.items()}


def twins(name: str, seed: int = 0, **overrides) -> tuple[VisionTransformer, nn.Module]:
    """fastvit's and timm's model of an architecture, in evaluation mode, strictly sharing random weights."""
    theirs = timm.create_model(name, **overrides).eval()
    ours = VisionTransformer(**constructor_arguments(name) | overrides).eval()
    ours.load_state_dict(randomize(theirs, seed).state_dict(), strict=True)
    return ours, theirs


def plain_architectures() -> list[str]:
    """The architectures that timm builds from its plain VisionTransformer class and its ordinary block."""
    names = timm.list_models(module="vision_transformer") + timm.list_models("deit*", module="deit")
    # Another class (distilled), other blocks (parallel, res-post), differential attention.
    special = ("distilled", "_xp_", "_rpn_", "18x2", "_pwee_", "_dwee_", "_dlittle_", "_dpwee_")
    return [name for name in names if not any(word in name for word in special)]
