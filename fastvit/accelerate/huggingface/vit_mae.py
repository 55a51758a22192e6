"""transformers' ViT-MAE, in training and as an encoder; its embedding drops patches, and stays as it is."""

from transformers.models.vit_mae import modeling_vit_mae as vit_mae

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer

ATTENTIONS[known(vit_mae.ViTMAEAttention)] = AttentionNames()
MLPS[known(vit_mae.ViTMAEMLP)] = FC_MLP


@replaces(vit_mae.ViTMAELayer)
class ViTMAELayer(Layer, vit_mae.ViTMAELayer):
    parts = VIT
