"""A run that shows what no graph can hold: Python that has to know the numbers which the model computes.

On a GPU a capture breaks there, and can leave torch's allocator and generators in a bad state; on a CPU the
numbers of one call would be taken for those of all, and nobody notice.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .graph_calls import Uncapturable


def on_trial(kind: str, forward: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> list[Tensor]:
    """The tensors that come from outside, from a cache say, in a run on devices of this kind.

    Raises:
        Uncapturable: if numbers are read.
    """
    ops = _Ops(kind, inputs)
    # torch's higher-order ops, some of which take no modes.
    with suppress(NotImplementedError), _Methods(kind), ops:
        forward(inputs)
        return list(ops.outside.values())
    return []


class _Methods(TorchFunctionMode):
    """Ends a run at a method of tensors that reads their memory past torch's ops."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READS and args[0].device.type == self._kind:
            raise _needed(f"Tensor.{function.__name__}")
        return function(*args, **kwargs or {})


class _Ops(TorchDispatchMode):
    """Notes what comes from outside, and ends a run at an op that reads numbers."""

    def __init__(self, kind: str, inputs: list[Tensor]) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self._kind, self._made = kind, {id(tensor): weakref.ref(tensor) for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        out = function(*args, **kwargs or {})
        made = _tensors(out)
        if any(t.device.type == self._kind for t in given) and _waits(function, args, given + made):
            raise _needed(str(function))
        for tensor in given:
            if self._made.get(id(tensor), lambda: None)() is not tensor:
                self.outside[id(tensor)] = tensor.detach()
        self._made |= {id(tensor): weakref.ref(tensor) for tensor in made}
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _waits(function: Any, args: tuple, tensors: list[Tensor]) -> bool:
    """Whether an op has to know numbers that are computed, or moves tensors to or from the device."""
    if str(function) in _INDEXES:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if str(function) in _COPIES:
        return len({tensor.device.type for tensor in tensors}) > 1
    return not _READS_BACK.isdisjoint(getattr(function, "tags", ()))


def _needed(what: str) -> Uncapturable:
    return Uncapturable(f"{what} has to know numbers that the model computes")


# By name: to look them up takes milliseconds of every import.
_INDEXES = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")
_COPIES = ("aten._to_copy.default", "aten.copy_.default")
_READS_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
