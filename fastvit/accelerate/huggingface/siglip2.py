"""transformers' SigLIP 2; its embedding takes patches that were cut before, and stays as it is."""

from transformers.models.siglip2 import modeling_siglip2 as siglip2

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .layer import ATTENTIONS, CLIP, CLIP_ATTENTION, FC_MLP, LayerWithoutOptions

ATTENTIONS[known(siglip2.Siglip2Attention)] = CLIP_ATTENTION
MLPS[known(siglip2.Siglip2MLP)] = FC_MLP


@replaces(siglip2.Siglip2EncoderLayer)
class Siglip2EncoderLayer(LayerWithoutOptions, siglip2.Siglip2EncoderLayer):
    parts = CLIP
