"""transformers' SigLIP: both towers, whose layers are of one class."""

from transformers.models.siglip import modeling_siglip as siglip

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .clip_embedding import TableEmbedding
from .layer import ATTENTIONS, CLIP, CLIP_ATTENTION, FC_MLP, LayerWithoutOptions

ATTENTIONS[known(siglip.SiglipAttention)] = CLIP_ATTENTION
MLPS[known(siglip.SiglipMLP)] = FC_MLP


@replaces(siglip.SiglipEncoderLayer)
class SiglipEncoderLayer(LayerWithoutOptions, siglip.SiglipEncoderLayer):
    parts = CLIP


@replaces(siglip.SiglipVisionEmbeddings)
class SiglipVisionEmbeddings(TableEmbedding, siglip.SiglipVisionEmbeddings):
    pass
