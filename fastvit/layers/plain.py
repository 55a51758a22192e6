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


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """True if the module is exactly one of the classes and calling it would run nothing else.

    A hook, a parametrisation, a LoRA or quantised replacement, a pruned weight or a patched forward all
    answer False: whoever put it there wants it to run. So does a hook on every module of the process.
    """
    own = module.__dict__
    return type(module) in classes and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def is_identity(module: nn.Module) -> bool:
    """True for a plain nn.Identity, and for a plain nn.Dropout that drops nothing now."""
    if type(module) is nn.Dropout:
        return (module.p == 0.0 or not module.training) and is_plain(module, nn.Dropout)
    return is_plain(module, nn.Identity)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A plain layer's two parameters."""
    own = module._parameters
    return own["weight"], own.get("bias")
