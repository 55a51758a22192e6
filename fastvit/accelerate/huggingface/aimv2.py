"""transformers' AIMv2: RMSNorm and a gated MLP; its embedding has a norm of its own, and stays as it is."""

from transformers.models.aimv2 import modeling_aimv2 as aimv2

from ...layers.mlp import MLPS
from ...layers.norm import NORMS
from ...layers.plain import known
from ..registry import replaces
from .layer import ATTENTIONS, CLIP_ATTENTION, GATED_MLP, LayerWithoutOptions, Parts

ATTENTIONS[known(aimv2.Aimv2Attention)] = CLIP_ATTENTION
MLPS[known(aimv2.Aimv2MLP)] = GATED_MLP
NORMS[known(aimv2.Aimv2RMSNorm)] = "rms_norm"


@replaces(aimv2.Aimv2EncoderLayer)
class Aimv2EncoderLayer(LayerWithoutOptions, aimv2.Aimv2EncoderLayer):
    parts = Parts("rms_norm1", "attention", "rms_norm2", mlp="ffn")
