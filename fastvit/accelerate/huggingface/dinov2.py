"""transformers' DINOv2."""

from transformers.models.dinov2 import modeling_dinov2 as dinov2

from ..registry import replaces
from .dinov2_like import dinov2_like
from .embedding import Dinov2Embedding


@replaces(dinov2.Dinov2Layer)
class Dinov2Layer(dinov2_like(dinov2, "Dinov2"), dinov2.Dinov2Layer):
    pass


@replaces(dinov2.Dinov2Embeddings)
class Dinov2Embeddings(Dinov2Embedding, dinov2.Dinov2Embeddings):
    pass
