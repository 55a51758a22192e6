"""One captured kind of call, and what tells when it no longer stands for the model.

A CUDA graph reads memory, not modules. All that it reads is held here, so that one which is out of date
computes old numbers, and never reads what was freed.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import recording
from .call_facts import transformed
from .derived import Reading
from .layers.plain import IDLE_HOOKS
from .layers.settings import ATTRIBUTE

Run = Callable[[list[Tensor]], Any]


class Uncapturable(Exception):
    """No CUDA graph can hold the call: Uncapturable(reason)."""


class Gpu:
    """CUDA as graphs need it: a pool of memory, a stream to capture on, one replay after the other."""

    kind = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, None
        with torch.cuda.device(device):
            # For good: torch keeps a workspace of cuBLAS for each, and graphs write to the second's.
            self._side, self._stream = torch.cuda.Stream(), torch.cuda.Stream()
            self._done = torch.cuda.Event()
        self.renew()

    def renew(self) -> None:
        """Another pool: torch takes none again whose graphs are gone, or where a capture failed."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the caller's stream, after the last turn on any stream: graphs of one pool share memory."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if self._last not in (None, current):
                current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)
                self._last = current

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On a side stream, when all streams have waited, as torch has it before a capture."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    def capture(self, place: Callable[[], list[Tensor]], run: Run) -> tuple[Any, list[Tensor], Any]:
        """A graph with ``replay``, its inputs from ``place`` and what ``run`` gave for them."""
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        # Alone it leaves its stream current where the capture fails.
        with torch.cuda.stream(self._stream), captured:
            inputs = place()
            return graph, inputs, run(inputs)

    @staticmethod
    def is_capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()


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


class Bucket:
    """A captured call: inputs and outputs in fixed places, the graph between, and all that it reads.

    Raises:
        Uncapturable: if a run that is looked at, or the capture, fails; the call has been run before.
    """

    def __init__(self, gpu: Gpu, run: Run, places: Sequence[Place], inputs: list[Tensor]) -> None:
        self.reading, self.replays = Reading(), 0
        try:
            with self.reading:
                with gpu.aside():
                    run(inputs)
                    self._outside = _on_trial(gpu.kind, run, inputs)
                self._graph, self._inputs, out = gpu.capture(lambda: [p.empty() for p in places], run)
        except Exception as error:
            raise Uncapturable(_in_one_line(error)) from error
        self._leaves, self._spec = tree_flatten(out)
        for leaf in self._leaves:
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise Uncapturable(f"it returns a {type(leaf).__name__}, which is no pytree of tensors")
        self._size = places[0].shape[0]
        self._filled = self._size  # rows that may not be zero

    def fill(self, tensors: Sequence[Tensor], batch: int) -> None:
        """Copy the call's tensors in; rows beyond the batch are zeros."""
        for place, tensor in zip(self._inputs, tensors, strict=True):
            if place.shape == tensor.shape:
                place.copy_(tensor)
            else:
                place[:batch].copy_(tensor)
                place[batch : self._filled].zero_()
        self._filled = batch

    def replay(self) -> None:
        self._graph.replay()
        self.replays += 1

    def results(self, batch: int, clone: bool) -> Any:
        """What the call returned, of the batch's rows; in the graph's own memory where not cloned."""

        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if batch < self._size and leaf.ndim and leaf.shape[0] == self._size:
                leaf = leaf[:batch]
            return leaf.clone() if clone else leaf

        return tree_unflatten(map(given, self._leaves), self._spec)


def _on_trial(kind: str, run: Run, inputs: list[Tensor]) -> list[Tensor]:
    try:
        with _Trial(kind, inputs) as trial:
            run(inputs)
    except NotImplementedError:
        return []  # of torch's higher-order ops, some of which take no modes
    return list(trial.outside.values())


class _Trial(TorchDispatchMode):
    """A run that notes what comes from outside, from a cache say, and ends at what no graph can hold.

    A capture that breaks can leave torch's allocator and generators in a bad state: better not begun.
    """

    def __init__(self, kind: str, inputs: list[Tensor]) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self._kind, self._made = kind, {id(tensor): weakref.ref(tensor) for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        out = function(*args, **kwargs or {})
        made = _tensors(out)
        if any(t.device.type == self._kind for t in given) and _waits(function, args, given + made):
            raise Uncapturable(f"{function} makes the CPU wait for the GPU")
        for tensor in given:
            if self._made.get(id(tensor), lambda: None)() is not tensor:
                self.outside[id(tensor)] = tensor.detach()
        self._made |= {id(tensor): weakref.ref(tensor) for tensor in made}
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _waits(function: Any, args: tuple, tensors: list[Tensor]) -> bool:
    """Whether an op has to know numbers that are on the GPU, or moves tensors to or from it."""
    if str(function) in _INDEXES:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if str(function) in _COPIES:
        return len({tensor.device.type for tensor in tensors}) > 1
    return not _READS_BACK.isdisjoint(getattr(function, "tags", ()))


# By name: to look them up takes milliseconds of every import.
_INDEXES = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")
_COPIES = ("aten._to_copy.default", "aten.copy_.default")
_READS_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _in_one_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, Uncapturable) else f"{type(error).__name__}: {text}"


def onlooker() -> str | None:
    """Who is to see the model itself run, or None."""
    if torch._C._get_tracing_state() is not None or recording.active:
        return "the call is traced or recorded"
    if transformed():
        return "the call is inside a transform of torch.func"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    # torch.set_default_device is a mode too, and looks at nothing.
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return "a function mode is active"
    return "a CUDA graph is being captured" if Gpu.is_capturing() else None


class Watch:
    """A model as it was: modules, their classes and settings, where parameters and buffers lie.

    It holds their memory, so that no other tensor gets its address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._own = list(map(vars, self._modules))
        tables = [own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers")]
        self._empty, self._tables = [t for t in tables if not t], [t for t in tables if t]
        self._hooks = [own[name] for own in self._own for name in _HOOKS]
        self._hooks += [getattr(torch_modules, f"_global{name}") for name in _HOOKS]
        self._members, self._facts = self._contents(), self._told()
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._plain = [tensor for tensor in self._tensors if type(tensor) in PLAIN]
        self._memory = [tensor.detach() for tensor in self._plain]
        self._places = self._where()

    def changed(self) -> bool:
        """Whether something was replaced, moved or told anew; an edit in place is no change."""
        if any(self._empty) or self._told() != self._facts:
            return True
        members = self._contents()
        same = len(members) == len(self._members) and all(map(is_, members, self._members))
        return not same or self._where() != self._places

    def why_eager(self) -> str | None:
        """What the model has now that no graph replays, or None."""
        if any(self._hooks):
            hooks = chain.from_iterable(table.values() for table in self._hooks)
            if not all(any(idle(hook) for idle in IDLE_HOOKS) for hook in hooks):
                return "a module carries a hook"
        if any(own["training"] for own in self._own):
            return "a module is in training mode"
        other = next((type(tensor) for tensor in self._tensors if type(tensor) not in PLAIN), None)
        return None if other is None else f"a parameter is a {other.__name__}"

    def _contents(self) -> list:
        return [member for table in self._tables for member in table.values()]

    def _told(self) -> list:
        """Classes, which `accelerate` exchanges, its settings, and forwards that were patched."""
        told = [own.get(name) for name in (ATTRIBUTE, "forward") for own in self._own]
        return [*map(type, self._modules), *told]

    def _where(self) -> list:
        return [*map(Tensor.data_ptr, self._plain), *map(Tensor.stride, self._plain)]


PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
