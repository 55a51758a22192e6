"""Calls of a block in which no kernel served: the next one like it runs the original forward at once.

Asking a dozen modules and four tables takes longer than what a small block can gain. An answer that is out of
date costs no more than the speed of a kernel, as the original forward is always right: so little is asked.
"""

import torch
from torch import Tensor, nn

from .. import backends, measurements
from ..layers.plain import why_unfused

ATTRIBUTE = "_fastvit_idle"


def is_idle(module: nn.Module, x: Tensor) -> bool:
    """Whether no kernel served the last call of this kind."""
    if not _is_quiet(module):
        return False
    known = module.__dict__.get(ATTRIBUTE)
    return known is not None and type(x) is Tensor and known == _kind(x) and backends.is_automatic()


def became_idle(module: nn.Module, x: Tensor, served: bool) -> bool:
    """Keep whether a kernel served a call.

    If none did, the call's result is to be the original forward's, as the next one's will be: the same bits.
    """
    if not (_is_quiet(module) and type(x) is Tensor and backends.is_automatic()):
        return False  # and what was seen of other calls stands
    if served:
        forget(module)
    else:
        module.__dict__[ATTRIBUTE] = _kind(x)
    return not served


def _is_quiet(module: nn.Module) -> bool:
    """Whether nothing is drawn, traced or recorded: a checkpoint computes again what it computed first."""
    quiet = not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    return quiet and why_unfused() is None


def _kind(x: Tensor) -> tuple:
    return (x.shape, x.dtype, x.is_cuda, measurements.generation)


def forget(module: nn.Module) -> None:
    """What was seen of a module that is told something new."""
    module.__dict__.pop(ATTRIBUTE, None)
