"""transformers' I-JEPA, which has no class token."""

from transformers.models.ijepa import modeling_ijepa as ijepa

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .embedding import PATCHES, Embedding
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer

ATTENTIONS[known(ijepa.IJepaAttention)] = AttentionNames()
MLPS[known(ijepa.IJepaMLP)] = FC_MLP
PATCHES[known(ijepa.IJepaPatchEmbeddings)] = None


@replaces(ijepa.IJepaLayer)
class IJepaLayer(Layer, ijepa.IJepaLayer):
    parts = VIT


@replaces(ijepa.IJepaEmbeddings)
class IJepaEmbeddings(Embedding, ijepa.IJepaEmbeddings):
    prefix = ()
