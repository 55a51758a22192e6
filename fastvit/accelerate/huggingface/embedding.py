"""Class token and patches with learned positions, as transformers' ViT, DeiT and DINOv2 embed them."""

from typing import ClassVar

from torch import Tensor, nn

from ...layers.plain import Unfused, idle_child, plain_child
from ..embeddings import FusedEmbedding, Patches, patches

PATCHES: dict[type[nn.Module], None] = {}


class Embedding(FusedEmbedding):
    """Mixed into an embedding with ``patch_embeddings``, ``position_embeddings``, and these prefix tokens."""

    prefix: ClassVar[tuple[str, ...]] = ("cls_token",)

    def gather(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> tuple:
        found = self.patches(pixel_values, bool_masked_pos)
        if interpolate_pos_encoding:
            positions = self.resized_positions(found)
        elif tuple(pixel_values.shape[2:]) != tuple(self.patch_embeddings.image_size):
            raise Unfused("the images are not of the model's size")
        else:
            positions = self.position_embeddings
        return found.arguments(positions, *self.prefix_tokens())

    def patches(self, images: Tensor, masked: Tensor | None, cast: bool = False) -> Patches:
        """The images and their projection, if nothing else happens to them."""
        if masked is not None:
            raise Unfused("patches are masked")
        idle_child(self, "dropout")
        return patches(plain_child(self, "patch_embeddings", PATCHES), "projection", images, cast)

    def prefix_tokens(self) -> list[Tensor]:
        """[1, 1, D] each."""
        return [getattr(self, name) for name in self.prefix]

    def resized_positions(self, found: Patches) -> Tensor:
        """Those that the model's own method makes for a grid; of the tokens it asks the shape alone."""
        count = len(self.prefix) + found.count
        tokens = self.position_embeddings[:, :1].expand(-1, count, -1)
        return self.interpolate_pos_encoding(tokens, *found.images.shape[2:])


class Dinov2Embedding(Embedding):
    """The same where positions always follow the images' size, and images take the projection's dtype."""

    def gather(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        found = self.patches(pixel_values, bool_masked_pos, cast=True)
        return found.arguments(self.resized_positions(found), *self.prefix_tokens())
