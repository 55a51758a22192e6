"""Calls of a block in which no kernel served: the next one like it runs the original forward at once.

Asking a dozen modules and four tables takes longer than what a small block can gain. An answer that is out of
date costs no more than the speed of a kernel, as the original forward is always right.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import backends, measurements
from ..layers.settings import Settings

Kind = tuple
_calls: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def kind_of(module: nn.Module, settings: Settings, x: Tensor, args: tuple, kwargs: dict) -> Kind | None:
    """What the answer may depend on, of a call; None where no answer is to be remembered."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not backends.is_automatic():
        return None
    device = x.device.type
    if device == "meta" or settings.checkpoint or settings.subset:
        return None
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    others = [value.shape if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
    modes = (module.training, torch.is_grad_enabled(), autocast, measurements.generation)
    return (x.shape, x.dtype, x.device, modes, others)


def is_idle(module: nn.Module, kind: Kind | None) -> bool:
    """Whether no kernel served the last call of this kind."""
    return kind is not None and _calls.get(module) == kind


def remember(module: nn.Module, kind: Kind | None, idle: bool) -> None:
    """Keep what was seen of a call."""
    if kind is not None and idle:
        _calls[module] = kind
