"""`fold_normalize`: a model takes images as they come, and normalises them as it cuts them in patches."""

from collections.abc import Sequence

from torch import nn

from ..layers.settings import ATTRIBUTE, Settings
from .idle import forget


def fold_normalize(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Let a model take images that are not normalised: uint8, or floats in 0..1.

    Args:
        model: fastvit's own VisionTransformer, or a timm model that `accelerate` has changed. (Those of other
            libraries convert images before their embeddings see them.)
        mean, std: [C] in 0..1 units, as torchvision's Normalize takes them.

    Returns:
        The same object; ``restore`` takes it back.

    Raises:
        ValueError: if no patch embedding of the model can, or for another number of channels.
    """
    embeddings = [m for m in model.modules() if getattr(type(m), "normalizes", False)]
    if not embeddings:
        raise ValueError(
            f"no patch embedding of {type(model).__name__} can normalise: accelerate it first; "
            "those of timm's models and of fastvit's own can"
        )
    for module in embeddings:
        channels = next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
        if not len(mean) == len(std) == channels:
            given = f"mean has {len(mean)} values and std {len(std)}"
            raise ValueError(f"{given}; the model's images have {channels} channels")
        values = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        forget(module)
        module.__dict__[ATTRIBUTE] = Settings.of(module)._replace(**values)
    return model
