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
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

# id of the first source -> a weak reference that drops this entry, and {name: (sources as they were, value)}
_kept: dict[int, tuple[weakref.ref, dict[Hashable, tuple[list["_State"], Any]]]] = {}
_lock = threading.Lock()
_hook = None


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
    if not _keepable(sources):
        return None
    first = sources[0]
    owner, entries = _kept.get(id(first), (None, {}))
    entry = entries.get(name) if owner is not None and owner() is first else None
    if entry is not None and _are(entry[0], sources):
        return entry[1]
    states = list(map(_State, sources))
    value = compute()
    with _lock:
        _watch_optimizers()
        if owner is None or owner() is not first:
            owner, entries = weakref.ref(first, partial(_forget, id(first))), {}
            _kept[id(first)] = owner, entries
        entries[name] = states, value
    return value


def _are(states: list["_State"], sources: Sequence[Tensor | None]) -> bool:
    return all(map(_State.is_of, states, sources))


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

    def is_of(self, tensor: Tensor | None) -> bool:
        if tensor is None or self.id is None:
            return self.id is tensor
        return (
            self.ref() is tensor
            and self.facts == _facts(tensor)
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


def _keepable(sources: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        return False
    for source in sources:
        if source is not None and (type(source) not in _PLAIN or source.is_inference()):
            return False
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


_PLAIN = (Tensor, nn.Parameter)


def _drop(*_: Any) -> None:
    with _lock:
        _kept.clear()


def _watch_optimizers() -> None:
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_drop)
