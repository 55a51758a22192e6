"""transformers' I-JEPA, which has no class token."""

from transformers.models.ijepa import modeling_ijepa as ijepa

from ..registry import replaces
from .embedding import Embedding
from .vit_like import vit_like


@replaces(ijepa.IJepaLayer)
class IJepaLayer(vit_like(ijepa, "IJepa"), ijepa.IJepaLayer):
    pass


@replaces(ijepa.IJepaEmbeddings)
class IJepaEmbeddings(Embedding, ijepa.IJepaEmbeddings):
    prefix = ()
