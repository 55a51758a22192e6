"""transformers' DeiT, which has a distillation token."""

from transformers.models.deit import modeling_deit as deit

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .embedding import PATCHES, Embedding
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer

ATTENTIONS[known(deit.DeiTAttention)] = AttentionNames()
MLPS[known(deit.DeiTMLP)] = FC_MLP
PATCHES[known(deit.DeiTPatchEmbeddings)] = None


@replaces(deit.DeiTLayer)
class DeiTLayer(Layer, deit.DeiTLayer):
    parts = VIT


@replaces(deit.DeiTEmbeddings)
class DeiTEmbeddings(Embedding, deit.DeiTEmbeddings):
    prefix = ("cls_token", "distillation_token")
