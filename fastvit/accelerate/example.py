"""An input that a vision model takes, found in the places where the libraries keep its size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Mapping[str, Any]


def as_call(x: Inputs) -> tuple[tuple, dict]:
    """Positional and keyword arguments of the model's call."""
    return ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})


def example_input(model: nn.Module, batch_size: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Random images [B, C, H, W] of the model's own size, in its dtype and on its device.

    Raises:
        ValueError: if no part of the model says which size that is.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    for module in model.modules():
        size, channels = _size(module), _channels(model)
        if size is not None and channels is not None and parameter is not None:
            shape = (batch_size, channels, *size)
            if parameter.is_meta:
                return torch.empty(shape, dtype=parameter.dtype, device="meta")
            images = torch.randn(shape, generator=generator)
            return images.to(parameter.device, parameter.dtype)
    raise ValueError(f"{type(model).__name__} does not say which image size it takes: pass x")


def _channels(model: nn.Module) -> int | None:
    """The images' channels: what the first convolution takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def _size(module: nn.Module) -> tuple[int, int] | None:
    config = getattr(module, "config", None)
    cfg = getattr(module, "pretrained_cfg", None) or {}
    places = (
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        cfg.get("input_size", (None,))[1:] if isinstance(cfg, dict) else None,
        getattr(getattr(config, "vision_config", config), "image_size", None),
        getattr(module, "image_size", None),
    )
    for size in places:
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None
