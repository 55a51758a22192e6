"""What the model sees: its patch features as colours, and what its class token attends to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .photos import normalize

_EDGE = 6.0  # how sharply the foreground ends, per standard deviation of the first component
_DARKEST = 0.12  # the foreground's darkest red, green or blue, which keeps it apart from the black behind it


@dataclass(frozen=True)
class Sight:
    """Of B photos: uint8 [B, 3, S, S], feature colours [B, S, S, 3] in 0..1, attention [B, S, S] in 0..1."""

    images: Tensor
    colours: Tensor
    attention: Tensor


@torch.inference_mode()
def look(model: nn.Module, images: Tensor, on_photo: Callable[[], object] = lambda: None) -> Sight:
    """Run uint8 square images [B, 3, S, S] through the model, one at a time."""
    patches, attention = [], []
    device = next(model.parameters()).device
    for image in images:
        before, after = _last_block(model, normalize(image[None]).to(device))
        patches.append(model.norm(after)[:, model.num_prefix_tokens :].cpu())
        attention.append(class_attention(model.blocks[-1], before)[:, model.num_prefix_tokens :].cpu())
        on_photo()
    size = images.shape[-1]
    return Sight(images, feature_colours(torch.cat(patches), size), _heat(torch.cat(attention), size))


def _last_block(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [B, N, D] that go into the last block, and those that come out."""
    depth = len(model.blocks)
    both = model.forward_intermediates(
        x,
        indices=[depth - 2, depth - 1],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    before, after = (torch.cat([prefix, patches], dim=1) for patches, prefix in both)
    return before, after


def class_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """How much the class token attends to every token [B, N], mean over heads; `tokens` go into the block."""
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
    q, k = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.einsum("bhd,bnhd->bhn", q * block.attn.scale, k)
    return scores.softmax(-1).mean(1)


def feature_colours(patches: Tensor, size: int) -> Tensor:
    """Patch features [B, N, D] of N = n x n as colours [B, size, size, 3] in 0..1, on black.

    DINOv2's recipe (arXiv 2304.07193, section 7.5): the first principal component over all photos parts
    foreground from background, and the first three of the foreground alone are red, green and blue.
    """
    first = _project(patches, patches.flatten(0, 1), 1)[..., 0]
    first = first / first.std().clamp_min(1e-6)
    # A component's sign is arbitrary. Photos keep their subject off the border.
    first = first * torch.sign(_centre_minus_border(first))
    foreground = first >= 0
    colours = _project(patches, patches[foreground], 3)
    low, high = colours[foreground].quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = (colours - low) / (high - low).clamp_min(1e-6)
    smooth = _upsample(torch.cat([colours, first[..., None]], dim=-1), size)
    lifted = _DARKEST + (1 - _DARKEST) * smooth[..., :3].clamp(0, 1)
    return lifted * torch.sigmoid(_EDGE * smooth[..., 3:])


def _project(patches: Tensor, of: Tensor, components: int) -> Tensor:
    """Patches [B, N, D] onto the principal components of `of` [M, D], each pointing to its longer tail."""
    mean = of.mean(0)
    _, vectors = torch.linalg.eigh((of - mean).T @ (of - mean))
    axes = vectors[:, -components:].flip(1)
    axes = axes * torch.where(((of - mean) @ axes).pow(3).sum(0) < 0, -1.0, 1.0)
    return (patches - mean) @ axes


def _centre_minus_border(values: Tensor) -> Tensor:
    side = int(values.shape[1] ** 0.5)
    grid = values.unflatten(1, (side, side))
    quarter = max(side // 4, 1)
    return grid[:, quarter:-quarter, quarter:-quarter].mean() - grid.mean()


def _heat(attention: Tensor, size: int) -> Tensor:
    """Attention [B, N] as [B, size, size] in 0..1; the top percent of each photo is all white."""
    top = attention.quantile(0.99, dim=1, keepdim=True).clamp_min(1e-12)
    return _upsample((attention / top)[..., None], size)[..., 0].clamp(0, 1)


def _upsample(values: Tensor, size: int) -> Tensor:
    """[B, n * n, C] to [B, size, size, C], bicubically."""
    side = int(values.shape[1] ** 0.5)
    grid = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=(size, size), mode="bicubic").permute(0, 2, 3, 1)
