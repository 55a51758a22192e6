"""transformers' DINOv2."""

from transformers.models.dinov2 import modeling_dinov2 as dinov2

from ...layers.mlp import MLPS
from ...layers.plain import known
from ...layers.regularization import DROP_PATHS, LAYER_SCALES
from ..registry import replaces
from .embedding import PATCHES, Dinov2Embedding
from .layer import ATTENTIONS, DINO, FC_MLP, GATED_MLP, AttentionNames, Layer, uniform_scale

ATTENTIONS[known(dinov2.Dinov2Attention)] = AttentionNames()
MLPS[known(dinov2.Dinov2MLP)] = FC_MLP
MLPS[known(dinov2.Dinov2SwiGLUFFN)] = GATED_MLP
LAYER_SCALES[known(dinov2.Dinov2LayerScale)] = "lambda1"
DROP_PATHS[known(dinov2.Dinov2DropPath)] = uniform_scale
PATCHES[known(dinov2.Dinov2PatchEmbeddings)] = None


@replaces(dinov2.Dinov2Layer)
class Dinov2Layer(Layer, dinov2.Dinov2Layer):
    parts = DINO


@replaces(dinov2.Dinov2Embeddings)
class Dinov2Embeddings(Dinov2Embedding, dinov2.Dinov2Embeddings):
    pass
