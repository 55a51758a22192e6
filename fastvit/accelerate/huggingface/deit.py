"""transformers' DeiT, which has a distillation token."""

from transformers.models.deit import modeling_deit as deit

from ..registry import replaces
from .embedding import Embedding
from .vit_like import vit_like


@replaces(deit.DeiTLayer)
class DeiTLayer(vit_like(deit, "DeiT"), deit.DeiTLayer):
    pass


@replaces(deit.DeiTEmbeddings)
class DeiTEmbeddings(Embedding, deit.DeiTEmbeddings):
    prefix = ("cls_token", "distillation_token")
