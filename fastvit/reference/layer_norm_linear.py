"""The first half of attention: norm1 and the QKV projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .normalization import normalize


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "layer_norm",
) -> Tensor:
    """linear(norm(x)).

    Args:
        x: [B, N, D], floating.
        norm_weight: [D] or None.
        norm_bias: [D] or None; None for ``rms_norm``.
        weight: [O, D], Linear's layout; or several, whose outputs are put side by side.
        bias: [O] or None; one for each of several weights.
        eps: added to the variance (``layer_norm``) or the mean square (``rms_norm``).
        norm: "layer_norm" (arXiv 1607.06450) or "rms_norm" (arXiv 1910.07467).

    Returns:
        [B, N, O].
    """
    h = normalize(x, norm_weight, norm_bias, eps, norm)
    if isinstance(weight, Tensor):
        return F.linear(h, weight, bias)
    return torch.cat([F.linear(h, *each) for each in zip(weight, bias, strict=True)], dim=-1)
