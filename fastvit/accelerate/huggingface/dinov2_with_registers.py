"""transformers' DINOv2 with register tokens, which have no positions."""

from torch import Tensor
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2

from ...layers.mlp import MLPS
from ...layers.plain import known
from ...layers.regularization import DROP_PATHS, LAYER_SCALES
from ..registry import replaces
from .embedding import PATCHES, Dinov2Embedding
from .layer import ATTENTIONS, DINO, FC_MLP, GATED_MLP, AttentionNames, Layer, uniform_scale

ATTENTIONS[known(dinov2.Dinov2WithRegistersAttention)] = AttentionNames()
MLPS[known(dinov2.Dinov2WithRegistersMLP)] = FC_MLP
MLPS[known(dinov2.Dinov2WithRegistersSwiGLUFFN)] = GATED_MLP
LAYER_SCALES[known(dinov2.Dinov2WithRegistersLayerScale)] = "lambda1"
DROP_PATHS[known(dinov2.Dinov2WithRegistersDropPath)] = uniform_scale
PATCHES[known(dinov2.Dinov2WithRegistersPatchEmbeddings)] = None


@replaces(dinov2.Dinov2WithRegistersLayer)
class Dinov2WithRegistersLayer(Layer, dinov2.Dinov2WithRegistersLayer):
    parts = DINO


@replaces(dinov2.Dinov2WithRegistersEmbeddings)
class Dinov2WithRegistersEmbeddings(Dinov2Embedding, dinov2.Dinov2WithRegistersEmbeddings):
    def gather(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        found = self.patches(pixel_values, bool_masked_pos, cast=True)
        positions = self.resized_positions(found)
        class_token = self.cls_token + positions[:, :1]
        return found.arguments(positions[:, 1:], class_token, self.register_tokens, for_prefix=False)
