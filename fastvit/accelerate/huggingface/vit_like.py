"""ViT and its kin, whose layers are one layer by many names, in transformers 5 and 4."""

from types import ModuleType

from torch import nn

from ...layers.mlp import MLPS
from ...layers.plain import known
from ..registry import classes
from .embedding import PATCHES
from .layer import ATTENTIONS, FC_MLP, VIT, AttentionNames, Layer
from .version4 import ViTLayer4, enter4


class ViTLikeLayer(Layer):
    """Mixed into a layer of transformers 5."""

    parts = VIT


def vit_like(module: ModuleType, prefix: str) -> type[nn.Module]:
    """Enter a model's classes, whose names begin with ``prefix``. Returns what to mix into its layers."""
    for patch_embeddings in classes(module, f"{prefix}PatchEmbeddings"):
        PATCHES[known(patch_embeddings)] = None
    if hasattr(module, f"{prefix}SelfAttention"):
        enter4(module, prefix)
        return ViTLayer4
    ATTENTIONS[known(getattr(module, f"{prefix}Attention"))] = AttentionNames()
    MLPS[known(getattr(module, f"{prefix}MLP"))] = FC_MLP
    return ViTLikeLayer
