"""The patch projection, with timm's arguments and parameter names."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.patch_embed import to_unit_range
from .plain import CONVOLUTIONS, is_identity, is_plain, known, why_unfused


def to_2tuple(value: int | Iterable[int]) -> tuple[int, int]:
    """(n, n) from n; pairs become tuples."""
    return tuple(value) if isinstance(value, Iterable) else (value, value)


@known
class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution (arXiv 2010.11929)."""

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if output_fmt not in (None, "NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be NCHW, NHWC, NLC or None")
        dd = {"device": device, "dtype": dtype}
        self.patch_size = to_2tuple(patch_size)
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer is not None else nn.Identity()

    def _set_img_size(self, img_size: int | tuple[int, int] | None) -> None:
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
            self.grid_size = tuple(
                side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True)
            )
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Another image size; another patch size by FlexiViT's resampling (arXiv 2212.08013)."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            self.patch_size = to_2tuple(patch_size)
            old = self.proj
            self.proj = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                self.patch_size,
                stride=self.patch_size,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            ).train(old.training)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_weight(old.weight, self.patch_size))
                if old.bias is not None:
                    self.proj.bias.copy_(old.bias)
            for new_param, old_param in zip(self.proj.parameters(), old.parameters(), strict=True):
                new_param.requires_grad_(old_param.requires_grad)
        self._set_img_size(img_size or self.img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a token, the larger of both directions or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid (H, W) of tokens that an image of this size gives."""
        (height, width), (ph, pw) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return -(-height // ph), -(-width // pw)
        return height // ph, width // pw

    def fit(self, images: Tensor, *, crop: bool = False, to_dtype: torch.dtype | None = None) -> Tensor:
        """Images of a size that this model takes, padded if it pads: see ``fit_images``."""
        return fit_images(
            images,
            in_chans=self.proj.weight.shape[1] * self.proj.groups,
            patch_size=self.patch_size,
            img_size=self.img_size if self.strict_img_size else None,
            any_size=self.img_size is None,
            pad=self.dynamic_img_pad,
            crop=crop,
            to_dtype=to_dtype,
        )

    def is_fusable(self) -> bool:
        """True if nothing here needs its own forward, so that the op `patch_embed` can do it all."""
        return (
            why_unfused() is None
            and is_plain(self, (PatchEmbed,))
            and is_plain(self.proj, CONVOLUTIONS)
            and is_identity(self.norm)
            and cuts_patches(self.proj)
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, N, D], or to the 4-D ``output_fmt``; uint8 is divided by 255."""
        if isinstance(self.proj, nn.Conv2d):
            images = self.fit(images, to_dtype=self.proj.weight.dtype)
        x = self.proj(images)
        if self.flatten or self.output_fmt == "NLC":
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 2, 3, 1)
        return self.norm(x)


def cuts_patches(proj: nn.Conv2d) -> bool:
    """False if someone made the patches overlap, or the convolution otherwise more than a cut."""
    return (
        proj.stride == proj.kernel_size
        and proj.padding in ((0, 0), "valid")
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )


def joined_tokens(*tokens: Tensor | None) -> Tensor | None:
    """Class and register tokens [1, n, D] as `patch_embed` takes them, [1, P, D]; None if there are none."""
    given = [token for token in tokens if token is not None]
    return torch.cat(given, dim=1) if len(given) > 1 else (given or [None])[0]


@torch.fx.wrap
def fit_images(
    images: Tensor,
    in_chans: int,
    patch_size: tuple[int, int],
    img_size: tuple[int, int] | None = None,
    any_size: bool = False,
    pad: bool = False,
    crop: bool = False,
    to_dtype: torch.dtype | None = None,
) -> Tensor:
    """Images [B, C, H, W] that a patch projection can take.

    Args:
        images: the images.
        in_chans: the C that the model takes.
        patch_size: (ph, pw).
        img_size: the one size that is accepted, or None for any multiple of the patch.
        any_size: without ``img_size``, accept other sizes too.
        pad: pad with zeros to whole patches, right and below.
        crop: leave out what no whole patch covers, right and below.
        to_dtype: turn uint8 images to 0..1 in this dtype.

    Raises:
        ValueError: for a wrong rank, channel count or size.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W]; the shape is {list(images.shape)}")
    channels, height, width = images.shape[1:]
    ph, pw = patch_size
    if channels != in_chans:
        raise ValueError(f"images have {channels} channels; the model takes {in_chans}")
    if not (height and width):
        raise ValueError(f"images are {height}x{width}: they hold no pixel")
    if img_size is not None and (height, width) != img_size:
        raise ValueError(
            f"images are {height}x{width}; the model takes {img_size[0]}x{img_size[1]}: resize them, call "
            "set_input_size, or build it with dynamic_img_size=True"
        )
    if to_dtype is not None and images.dtype == torch.uint8:
        images = to_unit_range(images, to_dtype)
    if not (height % ph or width % pw):
        return images
    if pad:
        return F.pad(images, (0, -width % pw, 0, -height % ph))
    if img_size is None and not any_size:
        raise ValueError(
            f"images are {height}x{width}, not a multiple of the patch, {ph}x{pw}: resize them, or build the "
            "model with dynamic_img_pad=True"
        )
    # A view, not a copy: 384 is not a multiple of 14, and a convolution never reads what is left over.
    return images[:, :, : height - height % ph, : width - width % pw] if crop else images


def resample_patch_weight(weight: Tensor, new_size: tuple[int, int]) -> Tensor:
    """FlexiViT's resize of a patch projection (arXiv 2212.08013, equation 4).

    The new [D, C, H, W] weight w' makes <w', resize(patch)> as close to <w, patch> as any can, for every
    patch: w' = pinv(B)^T w with B the matrix of the bicubic resize.
    """
    old_size = weight.shape[-2:]
    basis = torch.eye(old_size.numel(), device=weight.device).unflatten(1, old_size).unsqueeze(1)
    resize = F.interpolate(basis, size=new_size, mode="bicubic", antialias=True, align_corners=False)
    resize = resize.flatten(1).T
    flat = weight.flatten(2).to(resize.dtype)
    return (flat @ torch.linalg.pinv(resize)).unflatten(-1, new_size).to(weight.dtype)
