"""LayerNorm and RMSNorm over the last dimension, chosen by name."""

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("layer_norm", "rms_norm")


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    """``layer_norm`` (arXiv 1607.06450) or ``rms_norm`` (arXiv 1910.07467) of [..., D], affine by [D].

    Raises:
        ValueError: for any other name, or a bias with ``rms_norm``, which has none.
    """
    if norm == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm != "rms_norm":
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(NORMS)}")
    if bias is not None:
        raise ValueError("rms_norm has no bias; pass None")
    # Under autocast torch runs rms_norm in float32, but refuses a weight of another dtype.
    if weight is not None and weight.dtype != x.dtype and not is_autocast(x):
        weight = weight.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def is_autocast(x: Tensor) -> bool:
    """Whether torch casts what ops take on this tensor's device; on meta, of which torch cannot say, no."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
