"""transformers' MetaCLIP 2: both towers, whose layers are of one class, with the masks of the text's."""

from transformers.models.metaclip_2 import modeling_metaclip_2 as metaclip

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .clip_embedding import ClassTokenEmbedding
from .clip_like import clip_layer
from .layer import ATTENTIONS, CLIP_ATTENTION, FC_MLP

ATTENTIONS[known(metaclip.MetaClip2Attention)] = CLIP_ATTENTION
MLPS[known(metaclip.MetaClip2MLP)] = FC_MLP


@replaces(metaclip.MetaClip2EncoderLayer)
class MetaClip2EncoderLayer(clip_layer(metaclip.MetaClip2EncoderLayer), metaclip.MetaClip2EncoderLayer):
    pass


@replaces(metaclip.MetaClip2VisionEmbeddings)
class MetaClip2VisionEmbeddings(ClassTokenEmbedding, metaclip.MetaClip2VisionEmbeddings):
    pass
