"""transformers' ViT-MSN."""

from transformers.models.vit_msn import modeling_vit_msn as vit_msn

from ..registry import replaces
from .embedding import Embedding
from .vit_like import vit_like


@replaces(vit_msn.ViTMSNLayer)
class ViTMSNLayer(vit_like(vit_msn, "ViTMSN"), vit_msn.ViTMSNLayer):
    pass


@replaces(vit_msn.ViTMSNEmbeddings)
class ViTMSNEmbeddings(Embedding, vit_msn.ViTMSNEmbeddings):
    pass
