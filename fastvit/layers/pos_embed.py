"""Resize learned position embeddings to another grid, the way that the weights' own library does it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Each library resizes differently, and a model is only itself with its own library's way: on DINOv2's
# weights the wrong one moves the features by 1.8.
POS_RESIZE: dict[str, dict] = {
    "timm": {"mode": "bicubic", "antialias": True},
    "huggingface": {"mode": "bicubic", "antialias": False},
    "torchvision": {"mode": "bicubic", "antialias": False, "align_corners": True},
    "open_clip": {"mode": "bicubic", "antialias": True, "align_corners": False},
}


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    pos_resize: str = "timm",
) -> Tensor:
    """Resize [1, P + h * w, D] to [1, P + H * W, D]; the prefix rows stay.

    Args:
        pos_embed: the embeddings; float16 and bfloat16 are interpolated in float32.
        new_grid: (H, W).
        old_grid: (h, w); a square if None.
        num_prefix_tokens: P.
        pos_resize: whose way: "timm", "huggingface", "torchvision" or "open_clip".

    Raises:
        ValueError: for an unknown way, or rows that do not form the old grid.
    """
    if pos_resize not in POS_RESIZE:
        raise ValueError(f"pos_resize is {pos_resize!r}; it must be one of {', '.join(POS_RESIZE)}")
    num_patches = pos_embed.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(num_patches)
        old_grid = (side, side)
    if old_grid[0] * old_grid[1] != num_patches:
        raise ValueError(
            f"{num_patches} position embeddings do not form a grid of {old_grid[0]}x{old_grid[1]}"
        )
    # An exported program resizes even if the example image fits. In 2.11 the compiler claims to export.
    compiling = torch.compiler.is_dynamo_compiling()
    exporting = torch.compiler.is_exporting() and not compiling
    if compiling:
        # The backward of an antialiased resize has no symbolic sizes in torch: one graph a size.
        new_grid = tuple(len(range(side)) for side in new_grid)
    if not exporting and tuple(new_grid) == tuple(old_grid):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    wide = torch.promote_types(grid.dtype, torch.float32)
    grid = grid.to(wide).unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_grid), **POS_RESIZE[pos_resize])
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1)
