"""transformers' ViT."""

from transformers.models.vit import modeling_vit as vit

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .embedding import PATCHES, Embedding
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer

ATTENTIONS[known(vit.ViTAttention)] = AttentionNames()
MLPS[known(vit.ViTMLP)] = FC_MLP
PATCHES[known(vit.ViTPatchEmbeddings)] = None


@replaces(vit.ViTLayer)
class ViTLayer(Layer, vit.ViTLayer):
    parts = VIT


@replaces(vit.ViTEmbeddings)
class ViTEmbeddings(Embedding, vit.ViTEmbeddings):
    pass
