"""timm's Eva (EVA-02, DINOv3, Perception Encoder) and its pre-norm block with rotary positions."""

from collections.abc import Callable

import torch
from timm import layers
from timm.models import eva
from torch import Tensor, nn

from ..layers.attention import between_projections
from ..layers.halves import AttentionHalf, Branch, MlpHalf
from ..layers.mlp import MLPS
from ..layers.norm import norm_arguments
from ..layers.plain import LINEARS, Unfused, idle_child, known, plain_child, weight_and_bias
from ..layers.regularization import DROP_PATHS
from . import timm_layers
from .blocks import FusedBlock
from .joined import joined_projections
from .registry import LEFT_ALONE, Replacement, classes, outlives_restore, replaces
from .timm_embedding import Embedded, on_embedded

timm_layers.enter()

ATTENTIONS = (known(eva.EvaAttention), known(layers.AttentionRope))

for _layer in classes(eva, "EvaBlockPostNorm"):
    LEFT_ALONE[_layer] = "its norms come behind attention and MLP, where no op has them"


@replaces(eva.EvaBlock)
class EvaBlock(FusedBlock, eva.EvaBlock):
    def gather(
        self,
        frozen: bool,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        attn = plain_child(self, "attn", ATTENTIONS)
        if attn._modules.get("gate") is not None:
            raise Unfused("attn has a gate on its output")
        if getattr(attn, "num_kv_groups", 1) != 1:
            raise Unfused("attn has fewer heads of keys than of queries")
        idle_child(attn, "proj_drop")
        weight, bias = _qkv(attn)
        proj = weight_and_bias(plain_child(attn, "proj", LINEARS))
        norm = norm_arguments(self, "norm1").beside(weight)
        branch = Branch(self.gamma_1, plain_child(self, "drop_path1", DROP_PATHS), frozen)
        attention = AttentionHalf(norm, weight, bias, between_projections(attn), *proj, branch)
        mlp = plain_child(self, "mlp", MLPS)
        branch = Branch(self.gamma_2, plain_child(self, "drop_path2", DROP_PATHS), frozen)
        arguments = MLPS[type(mlp)](mlp, norm_arguments(self, "norm2"))
        options = {"attn_mask": attn_mask, "is_causal": is_causal, **_rotary(attn, rope)}
        return attention, MlpHalf(arguments, branch), options


def _qkv(attn: nn.Module) -> tuple[Tensor, Tensor | None]:
    if attn._modules.get("qkv") is None:
        return joined_projections([plain_child(attn, f"{part}_proj", LINEARS) for part in "qkv"])
    weight, bias = weight_and_bias(plain_child(attn, "qkv", LINEARS))
    parts = [getattr(attn, f"{part}_bias", None) for part in "qkv"]
    return weight, bias if parts[0] is None else torch.cat(parts)  # at every call, as the original does


def _rotary(attn: nn.Module, rope: Tensor | None) -> dict:
    """timm's table [..., N, 2 d] holds the sines, then the cosines."""
    if rope is None:
        return {}
    sin, cos = rope.chunk(2, dim=-1)
    layout = "half" if attn.rotate_half else "interleaved"
    tables = {"rope_cos": cos, "rope_sin": sin, "rope_layout": layout}
    return tables | {"num_prefix_tokens": attn.num_prefix_tokens}


@replaces(eva.Eva)
class Eva(Replacement, eva.Eva):
    normalizes = True

    @outlives_restore
    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return Eva._on_embedded(self, eva.Eva.forward_features, x, *args, **kwargs)

    @outlives_restore
    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        return Eva._on_embedded(self, eva.Eva.forward_intermediates, x, *args, **kwargs)

    def _on_embedded(self, forward: Callable, x: Tensor, *args, **kwargs):
        # In training it drops patches together with their rotary positions.
        if self.patch_drop is not None and self.training:
            return forward(self, x, *args, **kwargs)
        return on_embedded(forward, self, x, *args, **kwargs)

    @outlives_restore
    def _pos_embed(self, x: Tensor | Embedded) -> tuple[Tensor, Tensor | None]:
        if not isinstance(x, Embedded):
            return eva.Eva._pos_embed(self, x)
        rope = None
        if self.rope is not None:
            known_grid = not self.dynamic_img_size and hasattr(self.rope, "feat_shape")
            rope = self.rope.get_embed() if known_grid else self.rope.get_embed(shape=x.grid)
        return self.pos_drop(x.tokens), rope
