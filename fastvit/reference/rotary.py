"""Rotary position embedding (RoPE, arXiv 2104.09864) in the two layouts that vision transformers use."""

import torch
from torch import Tensor

ROPE_LAYOUTS = ("half", "interleaved")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, num_prefix_tokens: int) -> Tensor:
    """Rotate the tokens behind the prefix; class and register tokens have no place in the image.

    Args:
        x: [B, H, P + N, d].
        cos, sin: broadcastable to [B, H, N, d].
        layout: "half" pairs channel i with i + d/2 (DINOv3); "interleaved" pairs 2i with 2i + 1 (EVA-02).
        num_prefix_tokens: P.

    Returns:
        [B, H, P + N, d] in x's dtype; the rotation itself runs in the wider dtype of x and the tables.
    """
    prefix, tokens = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    turned = (tokens * cos + _quarter_turn(tokens, layout) * sin).to(x.dtype)
    return torch.cat([prefix, turned], dim=2) if num_prefix_tokens else turned


def _quarter_turn(x: Tensor, layout: str) -> Tensor:
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    if layout == "interleaved":
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    raise ValueError(f"rope_layout is {layout!r}; it must be one of {', '.join(ROPE_LAYOUTS)}")
