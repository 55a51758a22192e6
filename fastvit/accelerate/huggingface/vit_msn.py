"""transformers' ViT-MSN."""

from transformers.models.vit_msn import modeling_vit_msn as vit_msn

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .embedding import PATCHES, Embedding
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer

ATTENTIONS[known(vit_msn.ViTMSNAttention)] = AttentionNames()
MLPS[known(vit_msn.ViTMSNMLP)] = FC_MLP
PATCHES[known(vit_msn.ViTMSNPatchEmbeddings)] = None


@replaces(vit_msn.ViTMSNLayer)
class ViTMSNLayer(Layer, vit_msn.ViTMSNLayer):
    parts = VIT


@replaces(vit_msn.ViTMSNEmbeddings)
class ViTMSNEmbeddings(Embedding, vit_msn.ViTMSNEmbeddings):
    pass
