"""The weight initialisations that timm knows, by timm's names; the same seed draws the same weights."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

INIT_MODES = ("", "jax", "jax_nlhb", "moco", "reset", "skip")


@torch.no_grad()
def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Normal with this deviation, cut at -2 and 2: one draw an element, by the inverse error function."""
    edge = math.erf(2.0 / std / math.sqrt(2.0))
    return tensor.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2.0)).clamp_(-2.0, 2.0)


@torch.no_grad()
def trunc_normal_scaled_(tensor: Tensor, std: float) -> Tensor:
    """Standard normal cut at -2 and 2, then scaled: Flax's and TensorFlow's convention."""
    return trunc_normal_(tensor, std=1.0).mul_(std)


def lecun_normal_(tensor: Tensor) -> Tensor:
    """Truncated normal of variance 1 / fan_in."""
    fan_in = tensor[0].numel()
    # 0.8796 is the deviation of a standard normal cut at -2 and 2.
    return trunc_normal_scaled_(tensor, std=math.sqrt(1.0 / fan_in) / 0.87962566103423978)


def init_weights(model: nn.Module, mode: str, head_bias: float = 0.0, needs_reset: bool = True) -> None:
    """Initialise every module below ``model``, children before parents.

    Args:
        mode: "" (truncated normal, std 0.02), "jax" (as big_vision), "jax_nlhb" (with ``head_bias``),
            "moco" (as MoCo v3), "reset" or "skip" (each module's own default).
        head_bias: the classifier's bias in the "jax" modes.
        needs_reset: call ``reset_parameters`` of modules that the mode does not name.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in INIT_MODES:
        raise ValueError(f"weight_init is {mode!r}; it must be one of {', '.join(map(repr, INIT_MODES))}")
    by_mode: dict[str, Callable[[nn.Module, str], bool]] = {
        "": _timm,
        "jax": partial(_jax, head_bias=head_bias),
        "jax_nlhb": partial(_jax, head_bias=head_bias),
        "moco": _moco,
    }
    init = by_mode.get(mode)
    for name, module in _children_first(model):
        if init is not None and init(module, name):
            continue
        if init is not None and hasattr(module, "init_weights"):
            module.init_weights()
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _children_first(module: nn.Module, prefix: str = ""):
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _children_first(child, path)
        yield path, child


def _timm(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    trunc_normal_(module.weight, std=0.02)
    _zeros_(module.bias)
    return True


def _jax(module: nn.Module, name: str, head_bias: float) -> bool:
    if isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
        _zeros_(module.bias)
        return True
    if not isinstance(module, nn.Linear):
        return False
    if name.startswith("head"):
        nn.init.zeros_(module.weight)
        nn.init.constant_(module.bias, head_bias)
        return True
    nn.init.xavier_uniform_(module.weight)
    if module.bias is not None and "mlp" in name:
        nn.init.normal_(module.bias, std=1e-6)
    else:
        _zeros_(module.bias)
    return True


def _moco(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    if "qkv" in name:
        # q, k and v are three projections, each with its own fan-out.
        bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(module.weight)
    _zeros_(module.bias)
    return True


def _zeros_(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
