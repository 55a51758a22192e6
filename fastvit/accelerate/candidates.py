"""Which modules look like a transformer block, and why one of them is left alone."""

from torch import nn

from ..layers.block import Block
from ..layers.pool import AttentionPoolLatent
from ..ops.overrides import overridden
from .blocks import FusedBlock
from .registry import LEFT_ALONE, REPLACEMENTS, is_replaced

HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads")


def why_left_alone(module: nn.Module) -> str | None:
    """The reason why `accelerate` leaves this block as it is; None if it does not, or if it is no block."""
    layer = type(module)
    if layer in LEFT_ALONE:
        return LEFT_ALONE[layer]
    if is_replaced(module) or isinstance(module, Block):
        return None
    if layer in REPLACEMENTS:
        return "accelerate has not been called" if issubclass(REPLACEMENTS[layer], FusedBlock) else None
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
    """Attention beside norms and other layers: one of its children has heads, and it holds no smaller block.

    A module with a matrix of its own is none: attention pooling has its query there.
    """
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return False
    children = list(module.children())
    if len(children) < 3 or not any(map(_has_heads, children)):
        return False
    if any(p.ndim > 1 for p in module.parameters(recurse=False)):
        return False
    inside = (inner for inner in module.modules() if inner is not module)
    return not any(map(looks_like_a_block, inside))


def _has_heads(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        isinstance(getattr(module, n, None), int) for n in HEADS
    )


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """All transformer blocks by name, whether `accelerate` has replaced them or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (FusedBlock, Block)) or why_left_alone(module) is not None
    }


def hooked_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name whose forward calls ops: fastvit's own blocks, and those that were replaced."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Block, AttentionPoolLatent))
        or getattr(type(module), "original", None) in REPLACEMENTS
    }


def own_embeddings_of(model: nn.Module) -> dict[str, str]:
    """Patch embeddings of timm's kind that no op serves, as the model's class is not one that is replaced."""
    return {
        f"{name}.patch_embed".lstrip("."): f"{type(module).__name__} makes its tokens in a way of its own"
        for name, module in model.named_modules()
        if "patch_embed" in module._modules and not getattr(type(module), "normalizes", False)
    }


def typed_weights_of(model: nn.Module) -> dict[str, str]:
    """The blocks with a weight of another type, which a run without data does not see, and which it is."""
    found = {}
    for name, block in blocks_of(model).items():
        for parameter, tensor in block.named_parameters():
            if overridden((tensor,)):
                layer, _, kind = parameter.rpartition(".")
                found[name] = f"{layer} has a {type(tensor).__name__} as its {kind}"
    return found
