"""Tensors derived from parameters (folded, packed), kept beside the model until a parameter changes.

They are never attributes of a module: a packed copy there breaks deepcopy, pickle, torch.save and `.half()`.
A kept tensor is valid while each of its sources is the same tensor with the same storage, version, layout
and dtype. What does not raise a tensor's version: an optimizer's step (`fused=True` writes past it), after
which everything is derived anew; and edits through `.data`, after which ``refresh`` must be called.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_kept: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # first source -> {name: (sources as they were, value)}
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
    if not keepable(sources):
        return compute()
    first = sources[0]
    now = [_State(source) for source in sources if source is not None]
    entry = _kept.get(first, {}).get(name)
    if entry is not None and entry[0] == now:
        return entry[1]
    value = compute()
    with _lock:
        _watch_optimizers()
        _kept.setdefault(first, {})[name] = (now, value)
    return value


def refresh(model: nn.Module | None = None) -> None:
    """Derive anew at the next call what depends on the model's parameters and buffers, or everything.

    Needed after an edit through ``.data`` (``p.data.mul_(2)``), which torch records nowhere.
    """
    if model is None:
        return _drop()
    edited = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _lock:
        for entries in _kept.values():
            for name in [name for name, (states, _) in entries.items() if edited & {s.id for s in states}]:
                del entries[name]


class _State:
    """A source as it was. Nothing of it is kept alive, and no other tensor at its address is taken for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.id, self.ref = id(tensor), TensorWeakRef(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.facts = (
            tensor._version,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            _stream(tensor),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _State)
            and self.facts == other.facts
            and self.storage == other.storage
            and self.ref() is other.ref()
        )


def _stream(tensor: Tensor) -> int | None:
    """Another stream may not have waited for the one that derived it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def keepable(sources: Iterable[Tensor | None]) -> bool:
    """Whether ``derived`` keeps what it derives from these now."""
    if torch.is_grad_enabled():
        return False
    given = [source for source in sources if source is not None]
    if any(type(source) not in (Tensor, nn.Parameter) or source.is_inference() for source in given):
        return False
    return not (given[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _drop(*_: Any) -> None:
    with _lock:
        _kept.clear()


def _watch_optimizers() -> None:
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_drop)
