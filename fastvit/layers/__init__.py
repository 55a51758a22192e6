"""The modules of a vision transformer, with timm's parameter names, on the ops of `fastvit.ops`."""

from .attention import Attention
from .block import Block
from .mlp import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from .norm import LayerNorm, RmsNorm
from .patch_embed import PatchEmbed
from .pool import AttentionPoolLatent, AttentionPoolPrr
from .pos_embed import resize_pos_embed
from .regularization import DropPath, LayerScale, PatchDropout

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "Block",
    "DropPath",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "RmsNorm",
    "SwiGLU",
    "SwiGLUPacked",
    "resize_pos_embed",
]
