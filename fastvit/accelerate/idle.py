"""Calls that no kernel serves run the original forward at once: which they are is asked once a kind of call.

Asking a dozen modules and four tables takes longer than what a small block can gain. It computes nothing and
calls no module. An answer that is out of date costs no more than the speed of a kernel, as the original
forward is always right, and so are the ops: so little is asked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, measurements
from ..asking import would_serve
from ..call_facts import compute_dtype

ATTRIBUTE = "_fastvit_idle"
MOST = 64  # kinds of call that a module remembers


def is_served(module: nn.Module, x: Tensor) -> bool | None:
    """Whether the ops are to run for this call, or the original forward; None where that must be asked."""
    # Nothing is drawn or recorded: a checkpoint computes again what it computed first. Whether anyone traces
    # is asked by who gathers, and need not be where the original forward runs anyway.
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    if type(x) is not Tensor or not backends.is_automatic():
        return True
    return module.__dict__.get(ATTRIBUTE, {}).get(_kind(x))


def ask(module: nn.Module, x: Tensor, calls: Callable[[], Any]) -> bool:
    """Whether a kernel would serve one of the ops that ``calls`` calls, remembered for calls of this kind."""
    served = would_serve(calls)
    known = module.__dict__.get(ATTRIBUTE, {})
    current = [item for item in list(known.items()) if item[0][-1] == measurements.generation]
    # Another dictionary, and not a change of this one: other threads may read it.
    module.__dict__[ATTRIBUTE] = {**dict(current[1 - MOST :]), _kind(x): served}
    return served


def _kind(x: Tensor) -> tuple:
    tables = measurements.are_for_graphs(), measurements.generation
    return (x.shape, x.dtype, compute_dtype(x), x.is_cuda, *tables)


def forget(module: nn.Module) -> None:
    """What was seen of a module that is told something new."""
    module.__dict__.pop(ATTRIBUTE, None)
