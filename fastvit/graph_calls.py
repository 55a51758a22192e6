"""A call of a model as graphs know it: its tensors, how they lie, and what else decides what runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import backends, measurements
from .call_facts import tf32

# Arguments that are part of a kind of call: compared by value, and nobody can edit them.
_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)


class Uncapturable(Exception):
    """No graph can hold the call: Uncapturable(reason)."""


class Place(NamedTuple):
    """How a tensor of a call lies in a graph: packed, its dimensions in ``order``, outermost first."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, batch: int, size: int) -> "Place":
        """Of a tensor that has the batch as its first dimension with that size; of another as it is."""
        shape, order = tuple(tensor.shape), range(tensor.ndim)
        if not tensor.is_contiguous():
            strides = tensor.stride()
            if all(stride or length == 1 for length, stride in zip(shape, strides, strict=True)):
                order = sorted(order, key=lambda i: (shape[i] == 1, strides[i]), reverse=True)
        if shape[:1] == (batch,):
            shape = (size, *shape[1:])
        return cls(shape, tuple(order), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty_permuted(self.shape, self.order, dtype=self.dtype, device=self.device)

    def filled(self, tensor: Tensor) -> Tensor:
        """The tensor in such a place: as many of its rows as there are, above zeros."""
        place = self.empty().zero_()
        if place.shape == tensor.shape:
            return place.copy_(tensor)
        rows = min(len(place), len(tensor))
        place[:rows].copy_(tensor[:rows])
        return place

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For a run that may edit them."""
    return [tensor.clone() for tensor in tensors]


class Eager(Exception):
    """The call is to run eagerly: Eager(reason)."""


class Kind(NamedTuple):
    """What the calls of one bucket have alike."""

    places: tuple[Place, ...]
    spec: TreeSpec
    values: tuple
    settings: tuple

    def __str__(self) -> str:
        return " and ".join(map(str, self.places))


class Call(NamedTuple):
    """A forward's arguments: tensors, and of every leaf (type, value), None in a tensor's place."""

    tensors: list[Tensor]
    spec: TreeSpec
    values: tuple

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Call":
        leaves, spec = tree_flatten((args, kwargs))
        values = [(Tensor, None) if isinstance(v, Tensor) else (type(v), v) for v in leaves]
        other = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_VALUES))), None)
        if other is not None:
            raise Eager(f"an argument is a {type(other).__name__}")
        return cls([leaf for leaf in leaves if isinstance(leaf, Tensor)], spec, tuple(values))

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """With others in the places of its tensors."""
        given = iter(tensors)
        leaves = [next(given) if kind is Tensor else value for kind, value in self.values]
        return tree_unflatten(leaves, self.spec)

    def kind(self, size: int) -> Kind:
        places = tuple(Place.of(tensor, self.batch, size) for tensor in self.tensors)
        # 0.0 and -0.0 are equal, and divide into different things.
        values = tuple((t, repr(v) if t in (float, complex) else v) for t, v in self.values)
        return Kind(places, self.spec, values, _settings(self.device.type))


def _settings(device: str) -> tuple:
    """What decides beside the call itself which kernels run."""
    matmul, cudnn, cuda = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cuda
    return (
        *(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        *(*map(backends.requested, backends.TABLE), measurements.generation),
        *(tf32("linear"), tf32("patch_embed"), torch.are_deterministic_algorithms_enabled()),
        *(matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        *(cudnn.benchmark, cudnn.deterministic, cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()),
        *(cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), torch.get_default_dtype()),
        *(torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled),
    )


class Forward(NamedTuple):
    """A model with a call's arguments, to be run on other tensors in the places of the call's."""

    model: nn.Module
    call: Call

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.call.arguments(tensors)
        return self.model(*args, **kwargs)


class Graph(Protocol):
    """What was captured: a replay reads the inputs' places, which it may edit, and writes the outputs'."""

    def replay(self) -> None: ...


class Device(Protocol):
    """A kind of device as graphs need it."""

    # Whether a replay goes on while Python does.
    is_asynchronous: bool

    def __init__(self, device: torch.device) -> None: ...

    def renew(self) -> None:
        """Forget graphs that are gone, or a capture that failed."""

    def turn(self) -> AbstractContextManager[None]:
        """In which a call of the runner runs."""

    def on_trial(self, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
        """Runs that end at what no graph can hold; returns what is to be held with the graph."""

    def capture(
        self, forward: Forward, places: Sequence[Place], inputs: list[Tensor]
    ) -> tuple[Graph, list[Tensor], Any]:
        """A graph, its inputs in these places, and what the forward gave; ``inputs`` are an example."""

    @staticmethod
    def is_capturing() -> bool:
        """Whether someone captures now."""
