"""Calls of a block in which no kernel served: the next one like it runs the original forward at once.

Asking a dozen modules and four tables takes longer than what a small block can gain. An answer that is out of
date costs no more than the speed of a kernel, as the original forward is always right: so little is asked.
"""

import torch
from torch import Tensor, nn

from .. import backends, measurements

ATTRIBUTE = "_fastvit_idle"


def is_idle(module: nn.Module, x: Tensor) -> bool:
    """Whether no kernel served the last call of this kind.

    Never while gradients are recorded: what a checkpoint computes again must be what was computed first.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    known = module.__dict__.get(ATTRIBUTE)
    return known is not None and type(x) is Tensor and known == _kind(module, x) and backends.is_automatic()


def remember(module: nn.Module, x: Tensor, idle: bool) -> None:
    """Keep whether no kernel served a call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return
    if idle and type(x) is Tensor and backends.is_automatic():
        module.__dict__[ATTRIBUTE] = _kind(module, x)
    else:
        forget(module)


def _kind(module: nn.Module, x: Tensor) -> tuple:
    return (x.shape, x.dtype, x.is_cuda, module.training, measurements.generation)


def forget(module: nn.Module) -> None:
    """What was seen of a module that is told something new."""
    module.__dict__.pop(ATTRIBUTE, None)
