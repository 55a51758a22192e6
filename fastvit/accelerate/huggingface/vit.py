"""transformers' ViT."""

from transformers.models.vit import modeling_vit as vit

from ..registry import replaces
from .embedding import Embedding
from .vit_like import vit_like


@replaces(vit.ViTLayer)
class ViTLayer(vit_like(vit, "ViT"), vit.ViTLayer):
    pass


@replaces(vit.ViTEmbeddings)
class ViTEmbeddings(Embedding, vit.ViTEmbeddings):
    pass
