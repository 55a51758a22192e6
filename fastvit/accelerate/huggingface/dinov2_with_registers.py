"""transformers' DINOv2 with register tokens, which have no positions."""

from torch import Tensor
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2

from ..registry import replaces
from .dinov2_like import dinov2_like
from .embedding import Dinov2Embedding


@replaces(dinov2.Dinov2WithRegistersLayer)
class Dinov2WithRegistersLayer(dinov2_like(dinov2, "Dinov2WithRegisters"), dinov2.Dinov2WithRegistersLayer):
    pass


@replaces(dinov2.Dinov2WithRegistersEmbeddings)
class Dinov2WithRegistersEmbeddings(Dinov2Embedding, dinov2.Dinov2WithRegistersEmbeddings):
    def gather(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        found = self.patches(pixel_values, bool_masked_pos, cast=True)
        positions = self.resized_positions(found)
        class_token = self.cls_token + positions[:, :1]
        return found.arguments(positions[:, 1:], class_token, self.register_tokens, for_prefix=False)
