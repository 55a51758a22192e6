"""DINOv2 with registers and without, in transformers 5 and 4."""

from types import ModuleType

from torch import nn

from ...layers.mlp import MLPS
from ...layers.plain import known
from ...layers.regularization import DROP_PATHS, LAYER_SCALES
from .embedding import PATCHES
from .layer import ATTENTIONS, DINO, FC_MLP, GATED_MLP, AttentionNames, Layer, mlp, uniform_scale
from .version4 import Dinov2Layer4, enter4, packed_swiglu4


class Dinov2LikeLayer(Layer):
    """Mixed into a layer of transformers 5."""

    parts = DINO


def dinov2_like(module: ModuleType, prefix: str) -> type[nn.Module]:
    """Enter a model's classes, whose names begin with ``prefix``. Returns what to mix into its layers."""

    def entered(name: str) -> type[nn.Module]:
        return known(getattr(module, prefix + name))

    PATCHES[entered("PatchEmbeddings")] = None
    LAYER_SCALES[entered("LayerScale")] = "lambda1"
    DROP_PATHS[entered("DropPath")] = uniform_scale
    if hasattr(module, f"{prefix}SelfAttention"):
        enter4(module, prefix)
        MLPS[entered("MLP")] = mlp("fc1", "activation", "fc2")
        MLPS[entered("SwiGLUFFN")] = packed_swiglu4
        return Dinov2Layer4
    ATTENTIONS[entered("Attention")] = AttentionNames()
    MLPS[entered("MLP")] = FC_MLP
    MLPS[entered("SwiGLUFFN")] = GATED_MLP
    return Dinov2LikeLayer
