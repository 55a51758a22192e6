"""Who looks on as a model runs, and what tells that it is no longer the one of which a graph was made."""

from collections.abc import Callable
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import recording
from .call_facts import transformed
from .layers.plain import IDLE_HOOKS
from .layers.settings import ATTRIBUTE


def onlooker(is_capturing: Callable[[], bool]) -> str | None:
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
    return "a CUDA graph is being captured" if is_capturing() else None


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
        self._plain = [tensor for tensor in self._tensors if why_not_plain(tensor) is None]
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
        why = next(filter(None, map(why_not_plain, self._tensors)), None)
        return None if why is None else f"a parameter is {why}"

    def _contents(self) -> list:
        return [member for table in self._tables for member in table.values()]

    def _told(self) -> list:
        """Classes, which `accelerate` exchanges, its settings, and forwards that were patched."""
        told = [own.get(name) for name in (ATTRIBUTE, "forward") for own in self._own]
        return [*map(type, self._modules), *told]

    def _where(self) -> list:
        lies = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in self._plain]
        return [*map(Tensor.data_ptr, self._plain), *lies]


def why_not_plain(tensor: Tensor) -> str | None:
    """What a tensor is whose memory is more than its numbers, or None."""
    if type(tensor) not in _PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return f"quantized, nested, or laid out as {tensor.layout}"
    return None


_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
