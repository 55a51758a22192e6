"""Whether a module does what its class says, so that an op on its parameters may stand in for its forward."""

from torch import nn
from torch.nn.modules import module as _module


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """True if the module is exactly one of the classes and calling it would run nothing else.

    A hook, a parametrisation, a LoRA or quantised replacement, a pruned weight or a patched forward all
    answer False: whoever put it there wants it to run. So does a hook on every module of the process.
    """
    return type(module) in classes and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_identity(module: nn.Module) -> bool:
    """True for a plain nn.Identity, and for a plain nn.Dropout that drops nothing now."""
    if is_plain(module, nn.Dropout):
        return module.p == 0.0 or not module.training
    return is_plain(module, nn.Identity)
