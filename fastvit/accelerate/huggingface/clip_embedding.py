"""Patches with a table of positions, as transformers' CLIP (with a class token) and SigLIP embed them."""

from torch import Tensor

from ...layers.plain import Unfused
from ..embeddings import FusedEmbedding, patches


class TableEmbedding(FusedEmbedding):
    """Mixed into an embedding with ``patch_embedding`` and the positions in an nn.Embedding."""

    def gather(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False) -> tuple:
        found = patches(self, "patch_embedding", pixel_values, cast=True)
        prefix = self.prefix_tokens()
        size = tuple(found.images.shape[2:])
        if interpolate_pos_encoding:
            # The method asks of the tokens their shape alone.
            count = len(prefix) + found.count
            tokens = self.position_embedding.weight[None, :1].expand(-1, count, -1)
            return found.arguments(self.interpolate_pos_encoding(tokens, *size), *prefix)
        if size != (self.image_size, self.image_size):
            raise Unfused("the images are not of the model's size")
        return found.arguments(self.position_embedding(self.position_ids), *prefix)

    def prefix_tokens(self) -> list[Tensor]:
        """[1, 1, D] each."""
        return []


class ClassTokenEmbedding(TableEmbedding):
    """The same behind a class token, [D]."""

    def prefix_tokens(self) -> list[Tensor]:
        return [self.class_embedding.view(1, 1, -1)]
