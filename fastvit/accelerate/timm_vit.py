"""timm's VisionTransformer and its pre-norm block."""

from collections.abc import Callable

from timm.models import vision_transformer
from torch import Tensor, nn

from ..layers.block import attention_half, mlp_half
from ..layers.halves import AttentionHalf, MlpHalf
from . import timm_layers
from .blocks import FusedBlock
from .registry import LEFT_ALONE, Replacement, classes, outlives_restore, replaces
from .timm_embedding import Embedded, on_embedded

timm_layers.enter()

for _layer in classes(vision_transformer, "ResPostBlock"):
    LEFT_ALONE[_layer] = "its norms come behind attention and MLP, where no op has them"
for _layer in classes(vision_transformer, "ParallelScalingBlock", "DiffParallelScalingBlock"):
    LEFT_ALONE[_layer] = "its attention and MLP are parallel, behind one norm"
for _layer in classes(vision_transformer, "ParallelThingsBlock"):
    LEFT_ALONE[_layer] = "its attentions are parallel, and its MLPs"


# How else than by `layer_norm_mlp` the half of an MLP's class is computed.
MLP_HALVES: dict[type[nn.Module], Callable[[nn.Module, bool], Callable[[Tensor], Tensor]]] = {}


@replaces(vision_transformer.Block)
class Block(FusedBlock, vision_transformer.Block):
    def gather(
        self, frozen: bool, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        options = {"attn_mask": attn_mask, "is_causal": is_causal}
        mlp = MLP_HALVES.get(type(self._modules["mlp"]), mlp_half)
        return attention_half(self, frozen), mlp(self, frozen), options


@replaces(vision_transformer.VisionTransformer)
class VisionTransformer(Replacement, vision_transformer.VisionTransformer):
    normalizes = True

    @outlives_restore
    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return on_embedded(vision_transformer.VisionTransformer.forward_features, self, x, *args, **kwargs)

    @outlives_restore
    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        return on_embedded(
            vision_transformer.VisionTransformer.forward_intermediates, self, x, *args, **kwargs
        )

    @outlives_restore
    def _pos_embed(self, x: Tensor | Embedded) -> Tensor:
        if not isinstance(x, Embedded):
            return vision_transformer.VisionTransformer._pos_embed(self, x)
        return x.tokens if self.pos_embed is None else self.pos_drop(x.tokens)
