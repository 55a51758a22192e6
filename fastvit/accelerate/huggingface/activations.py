"""transformers' activations that the ops know, and its hooks that do nothing most of the time."""

from collections.abc import Callable

from transformers import activations

from ...layers.activation import ACTIVATION_NAMES
from ...layers.plain import IDLE_HOOKS, known
from ..registry import classes

try:
    from transformers.utils import output_capturing
except ImportError:  # before transformers 5, which patches forwards for the time of a call instead
    output_capturing = None

# Older versions have two names for GELUTanh, and lack some of the others.
for _names, _activation in (
    (("GELUActivation",), "gelu"),
    (("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), "gelu_tanh"),
    (("QuickGELUActivation",), "quick_gelu"),
    (("SiLUActivation",), "silu"),
):
    for _layer in classes(activations, *_names):
        ACTIVATION_NAMES[known(_layer)] = _activation


def captures_nothing(hook: Callable) -> bool:
    """Whether this is transformers' hook for recording outputs, at a time when its outputs are not recorded.

    The first call with ``output_hidden_states`` leaves such hooks on every layer and attention module.
    """
    code = getattr(hook, "__code__", None)
    if (
        code is None
        or code.co_name != "output_capturing_hook"
        or hook.__module__ != output_capturing.__name__
    ):
        return False
    recorded = output_capturing._active_collector.get()
    return recorded is None or hook.__closure__[code.co_freevars.index("key")].cell_contents not in recorded


if output_capturing is not None:
    IDLE_HOOKS.append(captures_nothing)
