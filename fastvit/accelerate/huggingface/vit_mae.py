"""transformers' ViT-MAE, in training and as an encoder; its embedding drops patches, and stays as it is."""

from transformers.models.vit_mae import modeling_vit_mae as vit_mae

from ..registry import replaces
from .vit_like import vit_like


@replaces(vit_mae.ViTMAELayer)
class ViTMAELayer(vit_like(vit_mae, "ViTMAE"), vit_mae.ViTMAELayer):
    pass
