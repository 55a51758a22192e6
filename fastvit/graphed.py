"""A model behind graphs: what it computes is run at once, and not found again by its modules at each call."""

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from . import measurements
from .graph_buckets import Bucket
from .graph_calls import Call, Device, Eager, Forward, Kind, Place, Uncapturable, copies
from .graph_cpu import Cpu
from .graph_gpu import Gpu
from .graph_watch import Watch, onlooker, why_not_plain

# Where calls can be captured, and how.
DEVICES: dict[str, type[Device]] = {"cuda": Gpu, "cpu": Cpu}
# More kinds of calls than that are a sign of an argument that changes at every call.
MOST_BUCKETS = 64
# How often in a row all graphs may be dropped before one was of use.
MOST_IN_VAIN = 8
_INDICES = (torch.int32, torch.int64)
# torch captures one CUDA graph at a time in a process.
_capturing = threading.Lock()
_thread = threading.local()


class graphed:
    """A runner: ``runner(x)`` is ``model(x)`` in evaluation mode without gradients, bit for bit.

    With the same kernels, that is: on a GPU `auto` may know one to gain in a graph alone, as its launch costs
    nothing there, and last bits are then that kernel's.

    A call whose batch is one of ``batch_sizes`` replays what the first like it has left, one for each batch,
    image size, dtype, memory layout, autocast and choice of backends: on a GPU a CUDA graph, on a CPU the
    ops that the model came down to, one after the other. Others run the model, and ``explain`` says why:
    with gradients, in training, with hooks, while traced; and, with a warning, where the model has to know
    numbers that it computes, or on a CPU draws some or computes outside of torch.

    Weights edited in place are followed, whoever writes them, and copies of frozen ones as ``accelerate``
    says of its mode "inference". Where parameters, buffers or modules are replaced
    or moved, graphs are captured again; until then the runner holds the memory of the old ones. Nothing else
    is seen: after a change of an attribute or a config, or in a runner inside the model, call ``reset``.

    The first call of a kind runs the model several times. Arguments are copied: those that are not dense are
    packed, so that sums over them may round otherwise, and what the model edits in place are the copies.
    A runner takes one call at a time. On a GPU that is the time in which they are put on their streams, and
    graphs, which share memory, run one after the other whatever streams they are on; on a CPU it is the whole
    call, so that each thread which is to compute by itself wants a copy of the runner. Copies and pickles
    begin without graphs.

    Args:
        model: kept as ``model``. Its forward takes tensors with the batch as their first dimension, and
            numbers, strings and the like, which are part of the kind of a call; it returns a pytree of
            tensors, and does nothing else.
        batch_sizes: at least one, all positive.
        pad: fill a smaller batch up to the next size with zeros, and cut of the outputs each tensor with
            that size as its first dimension. Products of another shape may round otherwise in last bits.
        clone: return tensors of the caller's own. With False the next call overwrites them.

    Raises:
        TypeError: if the model is no nn.Module, or scripted.
        ValueError: if ``batch_sizes`` is empty or holds anything but positive ints.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_sizes: Iterable[int] = (1, 8),
        *,
        pad: bool = False,
        clone: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"graphed: the model is a {type(model).__name__}; pass a torch.nn.Module")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise TypeError("graphed: a module of the model is scripted; pass it as it was before")
        sizes = list(batch_sizes) if isinstance(batch_sizes, Iterable) else []
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"graphed: batch_sizes must be positive ints, not {batch_sizes!r}")
        self.model, self.pad, self.clone = model, pad, clone
        self.batch_sizes = tuple(sorted(set(sizes)))
        self._lock = threading.RLock()
        self._devices: dict[torch.device, Device] = {}
        self.reset()

    def reset(self) -> None:
        """Free every graph and whatever they hold, and try again what could not be captured."""
        with self._lock:
            self._buckets: dict[Kind, Bucket] = {}
            self._refused: dict[Kind, str] = {}
            self._watch: Watch | None = None
            self._in_vain, self._why = 0, None
            for device in self._devices.values():
                device.renew()

    def __call__(self, *args, **kwargs) -> Any:
        """What the model returns."""
        if not torch.compiler.is_compiling():
            try:
                call = Call.of(args, kwargs)
                self._check(call)
                size = self._size(call.batch)
                with self._lock:
                    return self._replayed(call, size)
            except Eager as reason:
                self._why = str(reason)
        return self.model(*args, **kwargs)

    def capture(self, *args, **kwargs) -> "graphed":
        """Capture for every batch size, the largest first, whose memory others use; returns the runner.

        Args:
            args, kwargs: an example, of any batch. Where it would run eagerly nothing is captured.
        """
        try:
            with torch.no_grad():
                call = Call.of(args, kwargs)
                self._check(call)
                for size in reversed(self.batch_sizes):
                    with self._lock, self._device(call).turn():
                        self._bucket(call, size)
        except Eager as reason:
            self._why = str(reason)
        return self

    def explain(self) -> str:
        """A line for each graph, each kind of call that has none, and the last call that ran eagerly."""
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = [f"{type(self.model).__name__} graphed, batch sizes {sizes}"]
        lines += [f"{kind}: replayed {bucket.replays} times" for kind, bucket in self._buckets.items()]
        lines += [f"{kind}: eager: {reason}" for kind, reason in self._refused.items()]
        lines += [f"last eager call: {self._why}"] if self._why else []
        return "\n  ".join(lines)

    def __reduce__(self) -> tuple:
        return partial(graphed, pad=self.pad, clone=self.clone), (self.model, self.batch_sizes)

    def _check(self, call: Call) -> None:
        """Raises Eager if no graph can stand for the call."""
        if not call.tensors or call.tensors[0].ndim == 0:
            raise Eager("no argument is a tensor with a batch")
        if self.model.training:
            raise Eager("the model is in training mode")
        if (why := next(filter(None, map(why_not_plain, call.tensors)), None)) is not None:
            raise Eager(f"an argument is {why}")
        devices = {tensor.device for tensor in call.tensors}
        if len(devices) > 1 or call.device.type not in DEVICES:
            raise Eager(f"its arguments are on {', '.join(sorted(map(str, devices)))}")
        used = chain(call.tensors, self.model.parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used):
            raise Eager("gradients are recorded: call it under torch.no_grad()")
        if (reason := onlooker(DEVICES[call.device.type].is_capturing)) is not None:
            raise Eager(reason)
        if getattr(_thread, "captures", False):  # whose lock another thread may hold
            raise Eager("a model that it is in is being captured")
        if len(set(map(id, call.tensors))) < len(call.tensors):
            raise Eager("two of its arguments are the same tensor")

    def _size(self, batch: int) -> int:
        """Raises Eager if there is none for the batch."""
        for size in self.batch_sizes:
            if size == batch or (self.pad and size > batch > 0):
                return size
        raise Eager(f"a batch of {batch} is none of its sizes")

    def _replayed(self, call: Call, size: int) -> Any:
        device = self._device(call)
        with device.turn():
            bucket, is_new = self._bucket(call, size)
            # And asks while it runs: a graph out of date does no harm, but for an index beyond its table.
            ahead = device.is_asynchronous and not any(t.dtype in _INDICES for t in call.tensors)
            if ahead:
                bucket.run(call.tensors, call.batch)
            if is_new or not self._watch.changed():
                if (reason := self._watch.why_eager()) is not None:
                    raise Eager(reason)
                is_current = bucket.reading.is_current()
                if not is_current:
                    bucket.reading.derive()
                if not (is_current and ahead):
                    bucket.run(call.tensors, call.batch)
                return bucket.results(call.batch, self.clone)
            self._look()
        return self._replayed(call, size)

    def _device(self, call: Call) -> Device:
        if call.device not in self._devices:
            self._devices[call.device] = DEVICES[call.device.type](call.device)
        return self._devices[call.device]

    def _bucket(self, call: Call, size: int) -> tuple[Bucket, bool]:
        """The call's of that size, and whether it is new; raises Eager if there can be none."""
        kind = call.kind(size)
        if (bucket := self._buckets.get(kind)) is not None:
            return bucket, False
        if kind in self._refused:
            raise Eager(self._refused[kind])
        if len(self._buckets) + len(self._refused) >= MOST_BUCKETS or self._in_vain >= MOST_IN_VAIN:
            raise Eager("too many graphs were captured; reset() frees them and begins again")
        try:
            self._buckets[kind] = self._captured(kind, call)
        except Uncapturable as reason:
            self._refused[kind] = str(reason)
            self._device(call).renew()
            warnings.warn(f"graphed: {kind} runs eagerly: {reason}", RuntimeWarning, stacklevel=4)
            raise Eager(str(reason)) from None
        return self._buckets[kind], True

    def _captured(self, kind: Kind, call: Call) -> Bucket:
        self._look()
        if (reason := self._watch.why_eager()) is not None:
            raise Eager(reason)
        with _capturing, _undisturbed():
            inputs = list(map(Place.filled, kind.places, call.tensors))
            forward = Forward(self.model, call)
            # What the model raises is the caller's; and weights are derived, kernels compiled.
            forward(copies(inputs))
            self._look()
            bucket = Bucket(self._device(call), forward, kind.places, inputs)
        if self._watch.changed():
            raise Uncapturable("its forward replaces modules, parameters or buffers")
        return bucket

    def _look(self) -> None:
        """See the model as it is now; where it has changed every graph is freed."""
        if self._watch is not None and not self._watch.changed():
            return
        if self._buckets:
            used = any(bucket.replays > 2 for bucket in self._buckets.values())
            self._in_vain = 0 if used else self._in_vain + 1
        self._buckets.clear()
        self._watch = Watch(self.model)
        for device in self._devices.values():
            device.renew()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without gradients, inference tensors, and the casts in autocast's cache, which ends with it.

    Other runners run their models inside, a CPU's random numbers go on as if nothing had been drawn, and
    `auto` takes the kernels that gain in a graph.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    _thread.captures = True
    try:
        drawn_apart = torch.random.fork_rng(devices=[])
        with torch.inference_mode(False), torch.no_grad(), drawn_apart, measurements.for_graphs():
            yield
    finally:
        _thread.captures = False
        torch.set_autocast_cache_enabled(keeps)
