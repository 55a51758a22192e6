"""Images to tokens: patch projection, position embedding, prefix tokens (arXiv 2010.11929, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Project non-overlapping patches and write them, with positions, behind the prefix tokens.

    Args:
        images: [B, C, H, W], NCHW or channels_last, floating or uint8. uint8 is divided by 255.
        weight: [D, C, ph, pw], Conv2d's layout; H and W are multiples of ph and pw.
        bias: [D] or None.
        pos_embed: [1, P + N, D] (the prefix tokens get positions too), [1, N, D] (patches only) or None.
        prefix: [1, P, D], the class and register tokens, or None (P = 0).
        mean: [C] in 0..1 units, or None: images become (images - mean) / std first.
        std: [C] in 0..1 units, or None.

    Returns:
        [B, P + N, D], contiguous, with N = (H / ph) * (W / pw), in the dtype torch's own ops give.
    """
    x = to_unit_range(images, weight.dtype, mean, std)
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    num_patches = tokens.shape[1]
    if pos_embed is not None and pos_embed.shape[1] == num_patches:
        tokens, pos_embed = tokens + pos_embed, None
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    return tokens.contiguous()


def to_unit_range(
    images: Tensor, dtype: torch.dtype, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """uint8 to 0..1, then mean and std, in float32 at least: 8-bit images lose nothing before the cast."""
    if images.dtype != torch.uint8 and mean is None and std is None:
        return images
    wide = torch.float64 if torch.float64 in (dtype, images.dtype) else torch.float32
    out_dtype = dtype if images.dtype == torch.uint8 else images.dtype
    x = images.to(wide)
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None:
        x = x - mean.to(wide).view(-1, 1, 1)
    if std is not None:
        x = x / std.to(wide).view(-1, 1, 1)
    return x.to(out_dtype)
