"""Which modules look like a transformer block, and why one of them is left alone."""

from torch import nn

from ..layers.block import Block
from ..layers.plain import Unfused
from .registry import LEFT_ALONE, REPLACEMENTS, is_replaced

HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads")


def why_left_alone(module: nn.Module) -> str | None:
    """The reason why `accelerate` leaves this block as it is; None if it does not, or if it is no block."""
    layer = type(module)
    if layer in LEFT_ALONE:
        return LEFT_ALONE[layer]
    if is_replaced(module) or layer in REPLACEMENTS or isinstance(module, Block):
        return None
    if looks_like_a_block(module):
        base = next((base for base in layer.__mro__ if base in REPLACEMENTS), None)
        kind = (
            f"a subclass of {base.__module__}.{base.__qualname__}"
            if base
            else "of a kind that fastvit does not know"
        )
        return f"{layer.__module__}.{layer.__qualname__} is {kind}"
    return None


def looks_like_a_block(module: nn.Module) -> bool:
    """Attention beside a norm or other layers: one of its children has heads, and it is no container."""
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return False
    children = list(module.children())
    return len(children) > 2 and any(map(_has_heads, children))


def _has_heads(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        isinstance(getattr(module, n, None), int) for n in HEADS
    )


def why_not_fused(module: nn.Module, *args, **kwargs) -> str | None:
    """Why one of our blocks would run its own forward as it stands, or None."""
    try:
        module.gather(False, *args, **kwargs)
    except Unfused as reason:
        return str(reason)
    return None
