"""transformers' CLIP: both towers, whose layers are of one class, with the masks of the text's."""

from transformers.models.clip import modeling_clip as clip

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import replaces
from .clip_embedding import ClassTokenEmbedding
from .clip_like import clip_layer
from .layer import ATTENTIONS, CLIP_ATTENTION, FC_MLP

ATTENTIONS[known(clip.CLIPAttention)] = CLIP_ATTENTION
MLPS[known(clip.CLIPMLP)] = FC_MLP


@replaces(clip.CLIPEncoderLayer)
class CLIPEncoderLayer(clip_layer(clip.CLIPEncoderLayer), clip.CLIPEncoderLayer):
    pass


@replaces(clip.CLIPVisionEmbeddings)
class CLIPVisionEmbeddings(ClassTokenEmbedding, clip.CLIPVisionEmbeddings):
    pass
