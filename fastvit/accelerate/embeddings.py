"""Libraries' embedding modules on the op `patch_embed`: patches, prefix tokens and positions in one."""

from typing import NamedTuple

from torch import Tensor, nn

from .. import ops
from ..layers.patch_embed import cuts_patches, joined_tokens
from ..layers.plain import (
    CONVOLUTIONS,
    Unfused,
    plain_child,
    raise_if_unfused,
    ran_its_own_forward,
    weight_and_bias,
)
from ..layers.settings import Settings
from .registry import Replacement, library_class


class Patches(NamedTuple):
    """Images [B, C, H, W], and the convolution that cuts and projects them."""

    images: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def count(self) -> int:
        """N, an image's patches."""
        (height, width), (ph, pw) = self.images.shape[2:], self.weight.shape[2:]
        return (height // ph) * (width // pw)

    def arguments(self, positions: Tensor | None, *prefix: Tensor, for_prefix: bool = True) -> tuple:
        """`patch_embed`'s, of positions [1, P + N, D], or [1, N, D] if not ``for_prefix``, and prefix tokens.

        Raises:
            Unfused: if they do not fit: what that gives, or how it fails, only the original knows.
        """
        given = [tensor for tensor in (positions, *prefix) if tensor is not None]
        if any(tensor.dtype != self.weight.dtype for tensor in given):
            raise Unfused("its tokens and its projection have different dtypes")
        count = self.count + sum(token.shape[1] for token in prefix if for_prefix)
        if positions is not None and positions.shape[1] != count:
            raise Unfused("its positions are not those of its grid")
        return *self, positions, joined_tokens(*prefix)


def patches(parent: nn.Module, name: str, images: Tensor, cast: bool = False) -> Patches:
    """The images before the convolution of that name; ``cast`` gives them its dtype.

    Raises:
        Unfused: if it does more than to cut patches, or does not fit the images.
    """
    raise_if_unfused()
    projection = plain_child(parent, name, CONVOLUTIONS)
    weight, bias = weight_and_bias(projection)
    if not cuts_patches(projection):
        raise Unfused(f"{name} does more than to cut patches")
    if not isinstance(images, Tensor):
        raise Unfused(f"it is called with a {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != weight.shape[1]:
        raise Unfused(f"the images do not fit the channels of {name}")
    if images.shape[2] % weight.shape[2] or images.shape[3] % weight.shape[3]:
        raise Unfused("the images are not whole patches")
    if images.dtype != weight.dtype and not cast:
        raise Unfused(f"the images are {images.dtype} before a projection in {weight.dtype}")
    return Patches(images.to(weight.dtype), weight, bias)


class FusedEmbedding(Replacement):
    """Mixed into a library's embedding: the fused op, or its own forward where something is not plain."""

    def gather(self, pixel_values: Tensor, *args, **kwargs) -> tuple:
        """`patch_embed`'s arguments, of a call with these.

        Raises:
            Unfused: if the embedding is to run its own forward.
        """
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Tensor:
        kind = type(self)  # as it is now: restored, and another thread may exchange it meanwhile
        if not issubclass(kind, FusedEmbedding):
            return kind.forward(self, pixel_values, *args, **kwargs)
        try:
            arguments = kind.gather(self, pixel_values, *args, **kwargs)
        except Unfused as reason:
            ran_its_own_forward(reason)
        except (AttributeError, TypeError):  # of methods that went with the class, exchanged meanwhile
            if type(self) is kind:
                raise
        else:
            with Settings.of(self).context():
                return ops.patch_embed(*arguments)
        return library_class(kind).forward(self, pixel_values, *args, **kwargs)
