"""Whether a module does what its class says, so that an op on its parameters may stand in for its forward.

A block asks this of a dozen modules at every call. nn.Module's own attribute access runs Python code, so what
is asked here reads the modules' dictionaries.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .. import backends, recording
from ..call_facts import exporting
from ..ops.overrides import overridden

# Classes by what they compute. Other libraries' are added to such tables when their models are accelerated.
LINEARS: dict[type[nn.Module], None] = {nn.Linear: None, NonDynamicallyQuantizableLinear: None}
CONVOLUTIONS: dict[type[nn.Module], None] = {nn.Conv2d: None}
IDENTITIES: dict[type[nn.Module], None] = {nn.Identity: None}
DROPOUTS: dict[type[nn.Module], None] = {nn.Dropout: None}

# Forwards as they were when fastvit was imported: whoever patches one for the whole process wants it to run.
_FORWARDS = {
    layer: layer.forward
    for layer in (
        *(nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.RMSNorm, nn.ReLU, nn.SiLU),
        *(nn.ModuleList, nn.Sequential, NonDynamicallyQuantizableLinear),
    )
    if hasattr(layer, "forward")
}
_OTHER_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Each tells of a forward hook whether it would do nothing now: some libraries leave hooks for good.
IDLE_HOOKS: list[Callable[[Callable], bool]] = []
_said: set[str] = set()


class Unfused(Exception):
    """A module is to run its own forward: Unfused(reason), or Unfused(name, child) of a child not plain."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return self.args[0]
        name, child = self.args
        return f"{name} {_why_not_plain(child)}"


def ran_its_own_forward(reason: object) -> None:
    """Note that a module that could be fused was not, and why; say so once where a backend is asked for.

    It raises nothing, unlike an op that a backend cannot run: a hook, say, has its right to the original.
    """
    recording.ran_its_own_forward(reason)
    if torch.compiler.is_compiling():
        return
    asked = {name for op in backends.TABLE if (name := backends.requested(op)) not in ("auto", "reference")}
    message = f"{' and '.join(sorted(asked))} asked for, and a module ran its original forward: {reason}"
    if asked and message not in _said:
        _said.add(message)
        backends.logger.warning("%s", message)


def known(layer: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: ``is_plain`` may be asked about this class. One patched before is never plain."""
    owner = next(base for base in layer.__mro__ if "forward" in base.__dict__)
    written = (owner.__module__, f"{owner.__qualname__}.forward")
    patched = (layer.forward.__module__, layer.forward.__qualname__) != written
    _FORWARDS[layer] = None if patched else layer.forward
    return layer


def is_plain(module: nn.Module, classes: Collection[type[nn.Module]]) -> bool:
    """True if the module is exactly one of the (known) classes and calling it would run nothing else.

    A hook, a parametrisation, a LoRA or quantised replacement, a pruned weight, a weight whose type overrides
    torch's functions, or a patched forward all answer False: whoever put it there wants it to run. So does a
    hook on every module of the process.
    """
    layer, own = type(module), module.__dict__
    return (
        layer in classes
        and layer.forward is _FORWARDS[layer]
        and not (
            (own["_forward_hooks"] and _any_wanted(own["_forward_hooks"]))
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or ("forward" in own and is_patched(module))
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or (own["_parameters"] and overridden(tuple(own["_parameters"].values())))
        )
    )


def is_patched(module: nn.Module) -> bool:
    """Whether it has a forward of its own: more than its class's, which transformers 4 leaves on modules."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__self__", None) is not module or forward.__func__ is not type(module).forward


def _any_wanted(hooks: Mapping[int, Callable]) -> bool:
    return not all(any(idle(hook) for idle in IDLE_HOOKS) for hook in hooks.values())


def plain_child(parent: nn.Module, name: str, classes: Collection[type[nn.Module]]) -> nn.Module:
    """The child of that name.

    Raises:
        Unfused: if it is absent or not plain.
    """
    child = parent._modules.get(name)
    if child is None or not is_plain(child, classes):
        raise Unfused(name, child)
    return child


def why_unfused() -> str | None:
    """Why every module is to run its own forward now, or None: someone is to see it, or takes no op of ours.

    Tools on torch.fx look for modules; programs that are exported are to be those of the original model, and
    so are derivatives, unless a kernel is named: the ops then answer for themselves.
    """
    # Asked once or twice a block, and so without the functions of call_facts that ask the same.
    compiling = torch.compiler.is_compiling()
    if not compiling and is_fx_symbolic_tracing():
        return "torch.fx is tracing, and its tools look for modules"
    if compiling or torch._C._get_tracing_state() is not None:
        reason = exporting()
    elif torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        reason = "it is inside a transform of torch.func"
    else:
        return None
    return reason if reason and not backends.names_a_kernel() else None


def raise_if_unfused() -> None:
    """For whoever gathers what an op computes with, before the first look at a module.

    Raises:
        Unfused: if every module is to run its own forward now.
    """
    if reason := why_unfused():
        raise Unfused(reason)


def idle_child(parent: nn.Module, name: str) -> None:
    """See that the child of that name does nothing now: a plain Identity, or a Dropout that drops nothing.

    Raises:
        Unfused: if it does.
    """
    child = parent._modules.get(name)
    if child is None or not is_identity(child):
        raise Unfused(name, child)


def is_identity(module: nn.Module) -> bool:
    """True for a plain nn.Identity, and for a plain nn.Dropout that drops nothing now."""
    if type(module) in DROPOUTS:
        return (module.p == 0.0 or not module.training) and is_plain(module, DROPOUTS)
    return is_plain(module, IDENTITIES)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A plain layer's two parameters; wrappers such as FSDP keep views of them as ordinary attributes."""
    own = module._parameters
    if "weight" in own:
        return own["weight"], own["bias"] if "bias" in own else module.__dict__.get("bias")
    return module.weight, getattr(module, "bias", None)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of another name; wrappers such as FSDP keep views of it as an ordinary attribute."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def _why_not_plain(child: nn.Module | None) -> str:
    if child is None:
        return "is absent"
    own = child.__dict__
    if _any_wanted(own["_forward_hooks"]) or any(own[kind] for kind in _OTHER_HOOKS):
        return "carries a hook"
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return "is under a hook on every module of the process"
    layer = type(child)
    if is_patched(child) or _FORWARDS.get(layer, layer.forward) is not layer.forward:
        return "has a patched forward"
    for name, tensor in child._parameters.items():
        if tensor is not None and overridden((tensor,)):
            return f"has a {type(tensor).__name__} as its {name}"
    if type(child) in DROPOUTS and child.training and child.p:
        return f"drops activations (p = {child.p}, in training)"
    return f"is a {layer.__module__}.{layer.__qualname__}"
