"""What no graph can hold: Python that has to know the numbers which a model computes.

On a GPU a capture breaks there, and can leave torch's allocator and generators in a bad state; on a CPU the
numbers of one call would be taken for those of all, and nobody notice.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .graph_calls import Forward, Uncapturable


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Refuses:
    """A mode that ends a run, and knows why also where the model takes the exception for one of its own."""

    why: str | None = None

    def refuse(self, why: str) -> None:
        self.why = why
        raise Uncapturable(why)

    def raise_if_refused(self) -> None:
        if self.why is not None:
            raise Uncapturable(self.why)


class Methods(_Refuses, TorchFunctionMode):
    """Ends a run at a method that reads a tensor's memory on a CPU, past torch's ops."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READS:
            self.refuse(f"Tensor.{function.__name__} has to know numbers that the model computes")
        return function(*args, **kwargs or {})


class Ops(_Refuses, TorchDispatchMode):
    """Ends a run on devices of this kind at an op that has to know numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tensors_in((args, kwargs))
        out = function(*args, **kwargs or {})
        if any(tensor.device.type == self._kind for tensor in given):
            self._check(function, args, given, out)
        return out

    def _check(self, function: Any, args: tuple, given: list[Tensor], out: Any) -> None:
        if moves(function, given + tensors_in(out)):
            self.refuse(f"{function} moves a tensor from a device to another")
        if reads(function, args):
            self.refuse(f"{function} has to know numbers that the model computes")


class Outside(Ops):
    """Notes the tensors that are read and were not made in the run: weights, and what comes from a cache."""

    def __init__(self, kind: str, inputs: list[Tensor]) -> None:
        super().__init__(kind)
        self.tensors: dict[int, Tensor] = {}
        self._made = {id(tensor): weakref.ref(tensor) for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            if self._made.get(id(tensor), lambda: None)() is not tensor:
                self.tensors[id(tensor)] = tensor.detach()
        self._made |= {id(tensor): weakref.ref(tensor) for tensor in tensors_in(out)}
        return out


def outside(kind: str, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
    """The tensors from outside of a run on devices of this kind.

    Raises:
        Uncapturable: if it has to know numbers, or moves tensors.
    """
    try:
        with Outside(kind, inputs) as ops:
            forward(inputs)
    except NotImplementedError:
        return []  # of torch's higher-order ops, some of which take no modes
    ops.raise_if_refused()
    return list(ops.tensors.values())


def reads(function: Any, args: tuple) -> bool:
    """Whether an op has to know numbers: for what it returns, or the shape of it."""
    if str(function) in _INDEXES:
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return not _READS_BACK.isdisjoint(getattr(function, "tags", ()))


def moves(function: Any, tensors: list[Tensor]) -> bool:
    return str(function) in _COPIES and len({tensor.device.type for tensor in tensors}) > 1


# By name: to look them up takes milliseconds of every import.
_INDEXES = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")
_COPIES = ("aten._to_copy.default", "aten.copy_.default")
_READS_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
