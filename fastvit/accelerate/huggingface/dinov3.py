"""transformers' DINOv3: rotary positions for the patches, none for the class and register tokens."""

from functools import partial

from torch import Tensor
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from ...layers.attention import BetweenProjections
from ...layers.halves import AttentionHalf, MlpHalf
from ...layers.mlp import MLPS
from ...layers.plain import Unfused, known
from ...layers.regularization import DROP_PATHS, LAYER_SCALES
from ..embeddings import FusedEmbedding, patches
from ..registry import classes, replaces
from .layer import ATTENTIONS, DINO, GATED_MLP, UP_MLP, AttentionNames, Layer, uniform_scale

ATTENTIONS[known(dinov3.DINOv3ViTAttention)] = AttentionNames("num_heads", dropout="dropout")
MLPS[known(dinov3.DINOv3ViTMLP)] = UP_MLP
MLPS[known(dinov3.DINOv3ViTGatedMLP)] = GATED_MLP
LAYER_SCALES[known(dinov3.DINOv3ViTLayerScale)] = "lambda1"
for _layer in classes(dinov3, "Dinov3ViTDropPath", "DINOv3ViTDropPath"):
    DROP_PATHS[known(_layer)] = uniform_scale


@replaces(dinov3.DINOv3ViTLayer)
class DINOv3ViTLayer(Layer, dinov3.DINOv3ViTLayer):
    parts = DINO

    def gather(
        self,
        frozen: bool,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        attention, mlp, options = super().gather(frozen, attention_mask, **kwargs)
        attention = attention._replace(attend=partial(attend_rotated, attention.attend))
        return attention, mlp, options | {"position_embeddings": position_embeddings}


def attend_rotated(
    attend: BetweenProjections, qkv: Tensor, position_embeddings: tuple[Tensor, Tensor], **options
) -> Tensor:
    """The same with the last tokens rotated, by tables [N - P, d]."""
    cos, sin = position_embeddings
    num_prefix_tokens = qkv.shape[1] - sin.shape[-2]
    return attend(qkv, rope_cos=cos, rope_sin=sin, num_prefix_tokens=num_prefix_tokens, **options)


@replaces(dinov3.DINOv3ViTEmbeddings)
class DINOv3ViTEmbeddings(FusedEmbedding, dinov3.DINOv3ViTEmbeddings):
    def gather(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        if bool_masked_pos is not None:
            raise Unfused("patches are masked")
        found = patches(self, "patch_embeddings", pixel_values, cast=True)
        return found.arguments(None, self.cls_token, self.register_tokens)
