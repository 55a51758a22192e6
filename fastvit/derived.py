"""Copies of weights, folded or packed, which are kept where weights are frozen, beside the model.

Only ops that are told ``frozen=True`` keep any, as ``accelerate(mode="inference")`` has it; by default
weights are read where they lie. An attribute of a module would break deepcopy, pickle, torch.save and
`.half()`: a copy belongs to the storage of a weight, and dies with it. It is valid while each of its sources
is the same memory of the same version, layout and dtype, no optimizer has taken a step with it, and a few
elements of each row are what they were (weight_samples.py). What is written past all of these needs
``refresh``.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from .weight_samples import Sample, can_sample


class Copy:
    """A value derived from weights, and what tells that it is out of date. It keeps none of them alive."""

    def __init__(self, sources: Sequence[Tensor], compute: Callable[[], Any]) -> None:
        # First: what is written meanwhile is seen the next time.
        self._see(sources)
        self._sample = Sample(sources)
        self.storages = frozenset(state.id for state in self._states)
        self.value = compute()

    def _see(self, sources: Sequence[Tensor]) -> None:
        self._states, self._stream = list(map(_State, sources)), _stream(sources[0])

    def is_current(self, sources: Sequence[Tensor], any_stream: bool = False, look: bool = True) -> bool:
        """Whether nothing tells of a change. Another stream may not have waited for the one that derived it.

        Without ``look`` a graph has begun a look at the weights itself, which on a GPU is a launch.
        """
        same = len(sources) == len(self._states) and all(map(_State.is_of, self._states, sources))
        if not same or not (any_stream or self._stream == _stream(sources[0])):
            return False
        return not self._sample.differs(look)

    def renew(self, sources: Sequence[Tensor], compute: Callable[[], Any]) -> None:
        """The value anew, on the current stream, into the memory where it was."""
        self._see(sources)
        self._sample.take()
        with torch.inference_mode():  # in which tensors of either kind can be written
            for place, new in zip(tree_leaves(self.value), tree_leaves(compute()), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)

    def has_bits_of(self, other: "Copy") -> bool:
        """Whether both values are the same, bit for bit."""
        return all(
            map(torch.equal, map(_bits, tree_leaves(self.value)), map(_bits, tree_leaves(other.value)))
        )


def _bits(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        return torch.empty(0)
    dense = tensor.to_dense() if tensor.is_mkldnn else tensor
    return dense.contiguous().reshape(-1).view(torch.uint8)


# id of the first source's storage -> a weak reference to it that drops this entry, and {name: copy}
_kept: dict[int, tuple[weakref.ref, dict[Hashable, Copy]]] = {}
_lock = threading.Lock()
_thread = threading.local()
_hook = None


def kept(name: Hashable, sources: Sequence[Tensor | None], compute: Callable[[], Any]) -> Any:
    """``compute()``, or what it gave for the same sources before; None where nothing can be kept.

    That is while gradients are recorded, or somebody else captures a CUDA graph; of inference tensors, and
    tensors of other types (fake ones, subclasses); and where no compiled library can look at the weights.

    Args:
        name: what is derived, with everything that it depends on beside the sources.
        sources: the weights that it is derived from; it dies with the first one's storage.
        compute: derives it; must return tensors that share no memory with the sources.
    """
    given = [source for source in sources if source is not None]
    if torch.is_grad_enabled() or not all(map(_is_plain, given)) or not can_sample(given):
        return None
    name = (name, tuple(source is None for source in sources))
    if (reading := getattr(_thread, "reading", None)) is not None:
        return reading.find(name, given, compute)
    first = given[0]
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    copy = _copies_of(first).get(name)
    if copy is None or not copy.is_current(given):
        copy = Copy(given, compute)
        _keep(first.untyped_storage(), name, copy)
    return copy.value


def _copies_of(first: Tensor) -> dict[Hashable, Copy]:
    storage = first.untyped_storage()
    owner, copies = _kept.get(id(storage), (None, {}))
    return copies if owner is not None and owner() is storage else {}


def _keep(storage: torch.UntypedStorage, name: Hashable, copy: Copy) -> None:
    with _lock:
        _watch_optimizers()
        owner, copies = _kept.get(id(storage), (None, {}))
        if owner is None or owner() is not storage:
            # With what it needs as arguments: at exit the module's own names go first.
            owner, copies = weakref.ref(storage, partial(_forget, _kept, id(storage))), {}
            _kept[id(storage)] = owner, copies
        copies[name] = copy


def _forget(kept: dict, key: int, owner: weakref.ref) -> None:
    if kept.get(key, (None,))[0] is owner:
        kept.pop(key, None)


def everything() -> list[Copy]:
    """All copies that there are now."""
    return [copy for _, copies in list(_kept.values()) for copy in list(copies.values())]


def copies_of(model: nn.Module) -> dict[tuple, Copy]:
    """Those of the model's weights, by what they are."""
    storages, found = _storages((*model.parameters(), *model.buffers())), {}
    for key, (_, copies) in list(_kept.items()):
        found |= {(key, name): copy for name, copy in list(copies.items()) if copy.storages & storages}
    return found


def refresh(model: nn.Module | None = None) -> None:
    """Free the copies of the model's weights, or all that there are: the next call makes them anew.

    Needed in ``mode="inference"`` alone, after an edit that torch records nowhere and that leaves most
    elements as they were, such as ``p.data[0, 0] = 1``.
    """
    if model is None:
        with _lock:
            _kept.clear()
            for reading in list(_readings):
                reading.stale = True
    else:
        drop((*model.parameters(), *model.buffers()))


def drop(tensors: Iterable[Tensor]) -> None:
    """Free the copies of these weights."""
    if not _kept and not _readings:
        return
    storages = _storages(tensors)
    with _lock:
        for key, (_, copies) in list(_kept.items()):  # a list: to look may free storages, which drops entries
            for name in [name for name, copy in list(copies.items()) if copy.storages & storages]:
                del copies[name]
            if not copies:
                _kept.pop(key, None)
        for reading in list(_readings):
            reading.stale |= reading.depends_on(storages)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {id(tensor.untyped_storage()) for tensor in tensors if _is_plain(tensor)}


class Reading:
    """The copies that a graph reads: held, since it goes on reading the same memory.

    Inside the ``with`` block (a run before the capture, then the capture) this thread reads what is kept,
    whatever stream derived it, or derives its own: the caller sees to it that the streams have waited.
    Afterwards ``is_current`` tells whether a weight has changed, and ``derive`` follows it in place.
    """

    def __init__(self) -> None:
        self.stale = False
        self._reads: dict[tuple, tuple[Copy, Sequence[Tensor], Callable[[], Any]]] = {}

    def __enter__(self) -> Self:
        with _lock:
            _watch_optimizers()
            _readings.add(self)
        _thread.reading = self
        return self

    def __exit__(self, *exc_info) -> None:
        _thread.reading = None

    def find(self, name: Hashable, sources: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """What ``kept`` gives, of sources that it takes."""
        key = (name, *map(id, sources))
        copy = self._reads[key][0] if key in self._reads else _copies_of(sources[0]).get(name)
        if copy is None or not copy.is_current(sources, any_stream=True):
            copy = Copy(sources, compute)
        self._reads[key] = copy, sources, compute
        return copy.value

    def depends_on(self, storages: set[int]) -> bool:
        return any(copy.storages & storages for copy, _, _ in self._reads.values())

    def is_current(self) -> bool:
        """Whether no weight was written, no optimizer has taken a step and nobody has asked to refresh."""
        if self.stale and self._reads:
            return False
        return all(
            copy.is_current(sources, any_stream=True, look=False) for copy, sources, _ in self._reads.values()
        )

    def derive(self) -> None:
        """Everything anew, on the current stream, into the memory where it was."""
        self.stale = False
        for copy, sources, compute in self._reads.values():
            copy.renew(sources, compute)


_readings: weakref.WeakSet[Reading] = weakref.WeakSet()


class _State:
    """A weight as it was. No other tensor at its address is taken for it.

    The reference is to its storage: one to a parameter would keep torch.utils.swap_tensors from working.
    """

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.id, self._storage, self._facts = id(storage), weakref.ref(storage), _facts(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        return self._facts == _facts(tensor) and self._storage() is tensor.untyped_storage()


def _facts(tensor: Tensor) -> tuple:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _is_plain(source: Tensor) -> bool:
    return type(source) in _PLAIN and source.layout == torch.strided and not source.is_inference()


_PLAIN = (Tensor, nn.Parameter)


def _watch_optimizers() -> None:
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    """Some steps write past the version; what another model's optimizer did concerns its own parameters."""
    if _kept or _readings:
        drop(p for group in optimizer.param_groups for p in group["params"])
