"""Tensors derived from parameters (folded, packed), kept beside the model until a parameter changes.

They are never attributes of a module: a packed copy there breaks deepcopy, pickle, torch.save and `.half()`.
A kept tensor is valid while each of its sources is the same tensor with the same storage, version, layout
and dtype. What does not raise a tensor's version: an optimizer's step (`fused=True` writes past it), after
which everything is derived anew; and edits through `.data`, after which ``refresh`` must be called.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

# id of the first source -> a weak reference that drops this entry, and {name: (sources as they were, value)}
_kept: dict[int, tuple[weakref.ref, dict[Hashable, tuple[list["_State"], Any]]]] = {}
_lock = threading.Lock()
_hook = None
_thread = threading.local()


def derived(name: Hashable, sources: Sequence[Tensor | None], compute: Callable[[], Any]) -> Any:
    """``compute()``, or what it gave for the same sources before.

    Nothing is kept while gradients are recorded or a CUDA graph is captured, nor for inference tensors and
    tensors of other types (fake ones, subclasses).

    Args:
        name: what is derived, with everything that it depends on beside the sources.
        sources: the tensors that it is derived from, the first not None: it dies with that one.
        compute: derives it; must return tensors that share no memory with the sources.
    """
    return compute() if (value := kept(name, sources, compute)) is None else value


def kept(name: Hashable, sources: Sequence[Tensor | None], compute: Callable[[], Any]) -> Any:
    """What ``derived`` gives, but None, and nothing computed, where it could not be kept."""
    if torch.is_grad_enabled() or not all(map(_is_plain, sources)):
        return None
    if (reading := getattr(_thread, "reading", None)) is not None:
        return reading.find(name, sources, compute)
    first = sources[0]
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    owner, entries = _entries_of(first)
    states, value = entries.get(name, (None, None))
    if states is not None and all(map(_State.is_of, states, sources)):
        return value
    states, value = list(map(_State, sources)), compute()
    with _lock:
        _watch_optimizers()
        if owner is None:
            owner, entries = weakref.ref(first, partial(_forget, id(first))), {}
            _kept[id(first)] = owner, entries
        entries[name] = states, value
    return value


def _entries_of(first: Tensor) -> tuple[weakref.ref | None, dict]:
    owner, entries = _kept.get(id(first), (None, {}))
    return (owner, entries) if owner is not None and owner() is first else (None, {})


def everything() -> list[Any]:
    """All values that are kept now."""
    return [value for _, entries in _kept.values() for _, value in entries.values()]


def _forget(key: int, owner: weakref.ref) -> None:
    if _kept.get(key, (None,))[0] is owner:
        del _kept[key]


def refresh(model: nn.Module | None = None) -> None:
    """Derive anew at the next call what depends on the model's parameters and buffers, or everything.

    Needed after an edit through ``.data`` (``p.data.mul_(2)``), which torch records nowhere.
    """
    if model is None:
        return _drop()
    edited = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _lock:
        for _, entries in _kept.values():
            for name in [name for name, (states, _) in entries.items() if edited & {s.id for s in states}]:
                del entries[name]
        for reading in _readings:
            reading.stale |= reading.depends_on(edited)


class _Read(NamedTuple):
    sources: Sequence[Tensor | None]
    states: list["_State"]
    compute: Callable[[], Any]
    value: Any


class Reading:
    """What a graph reads of derived tensors: held, since it goes on reading the same memory.

    Inside the ``with`` block (a run before the capture, then the capture) this thread reads what is kept,
    whatever stream derived it, or derives its own: the caller sees to it that the streams have waited.
    Afterwards ``is_current`` tells whether a source has changed, and ``derive`` follows it in place.
    """

    def __init__(self) -> None:
        self.stale = False
        self._reads: dict[tuple, _Read] = {}
        # What others can edit of it, with its version.
        self._watched: list[Tensor] = []
        self._versions: list[int] = []

    def __enter__(self) -> Self:
        with _lock:
            _watch_optimizers()
            _readings.add(self)
        _thread.reading = self
        return self

    def __exit__(self, *exc_info) -> None:
        _thread.reading = None
        # What is derived from derived tensors follows those.
        inner = {id(leaf) for read in self._reads.values() for leaf in tree_leaves(read.value)}
        versions = {}
        for read in self._reads.values():
            for source, state in zip(read.sources, read.states, strict=True):
                if source is not None and id(source) not in inner:
                    versions[id(source)] = source, state.facts[0]
        self._watched = [source for source, _ in versions.values()]
        self._versions = [version for _, version in versions.values()]

    def find(self, name: Hashable, sources: Sequence[Tensor | None], compute: Callable[[], Any]) -> Any:
        """What ``kept`` gives, of sources that it takes."""
        key = (name, *map(id, sources))
        known = self._reads.get(key)
        states, value = known[1::2] if known else _entries_of(sources[0])[1].get(name, (None, None))
        if states is None or not all(map(_State.is_of, states, sources, repeat(True))):
            states, value = list(map(_State, sources)), compute()
        self._reads[key] = _Read(sources, states, compute, value)
        return value

    def depends_on(self, ids: set[int]) -> bool:
        return any(id(tensor) in ids for tensor in self._watched)

    def is_current(self) -> bool:
        """Whether no source was edited, no optimizer has taken a step and nobody has asked to refresh."""
        return not (self.stale and self._reads) and self._versions == [t._version for t in self._watched]

    def derive(self) -> None:
        """Everything anew, on the current stream, into the memory where it was."""
        # First: what is edited meanwhile is seen the next time.
        self.stale, self._versions = False, [tensor._version for tensor in self._watched]
        with torch.inference_mode():  # in which tensors of either kind can be written
            for read in self._reads.values():
                for place, new in zip(tree_leaves(read.value), tree_leaves(read.compute()), strict=True):
                    if isinstance(place, Tensor) and place is not new:
                        place.copy_(new)


_readings: weakref.WeakSet[Reading] = weakref.WeakSet()


class _State:
    """A source as it was. Nothing of it is kept alive, and no other tensor at its address is taken for it."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.id = None if tensor is None else id(tensor)
        if tensor is None:
            return
        self.ref = weakref.ref(tensor)
        # Holds the storage's address, though not its memory: no other storage gets it.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.facts = _facts(tensor)

    def is_of(self, tensor: Tensor | None, any_stream: bool = False) -> bool:
        if tensor is None or self.id is None:
            return self.id is tensor
        facts = _facts(tensor)
        if any_stream:
            facts = (*facts[:-1], self.facts[-1])
        return (
            self.ref() is tensor
            and self.facts == facts
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


def _facts(tensor: Tensor) -> tuple:
    return (
        *(tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()),
        _stream(tensor) if tensor.is_cuda else None,
    )


def _stream(tensor: Tensor) -> int:
    """Another stream may not have waited for the one that derived it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _is_plain(source: Tensor | None) -> bool:
    return source is None or (type(source) in _PLAIN and not source.is_inference())


_PLAIN = (Tensor, nn.Parameter)


def _drop(*_: Any) -> None:
    with _lock:
        _kept.clear()
        for reading in _readings:
            reading.stale = True


def _watch_optimizers() -> None:
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_drop)
