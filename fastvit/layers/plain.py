"""Whether a module does what its class says, so that an op on its parameters may stand in for its forward.

A block asks this of a dozen modules at every call. nn.Module's own attribute access runs Python code, so what
is asked here reads the modules' dictionaries.
"""

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from ..ops.overrides import overridden

# Forwards as they were when fastvit was imported: whoever patches one for the whole process wants it to run.
_FORWARDS = {
    layer: layer.forward
    for layer in (
        nn.Conv2d,
        nn.Dropout,
        nn.GELU,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.RMSNorm,
        nn.ReLU,
        nn.SiLU,
    )
}


def known(layer: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: ``is_plain`` may be asked about this class."""
    _FORWARDS[layer] = layer.forward
    return layer


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
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
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or (own["_parameters"] and overridden(tuple(own["_parameters"].values())))
        )
    )


def is_identity(module: nn.Module) -> bool:
    """True for a plain nn.Identity, and for a plain nn.Dropout that drops nothing now."""
    if type(module) is nn.Dropout:
        return (module.p == 0.0 or not module.training) and is_plain(module, nn.Dropout)
    return is_plain(module, nn.Identity)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A plain layer's two parameters; wrappers such as FSDP keep views of them as ordinary attributes."""
    own = module._parameters
    if "weight" in own:
        return own["weight"], own["bias"] if "bias" in own else module.__dict__.get("bias")
    return module.weight, getattr(module, "bias", None)
