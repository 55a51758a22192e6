"""open_clip's own transformer, of images and texts, and its vision tower's embedding."""

from open_clip import transformer
from torch import Tensor, nn

from .. import ops, recording
from ..call_facts import compute_dtype
from ..layers.activation import ACTIVATION_NAMES, activation_name
from ..layers.halves import AttentionHalf, Branch, MlpHalf
from ..layers.mlp import two_layers
from ..layers.norm import NORMS, NormArguments, norm_arguments
from ..layers.plain import LINEARS, Unfused, known, plain_child, ran_its_own_forward
from ..layers.regularization import LAYER_SCALES, layer_scale
from ..layers.settings import Settings
from .blocks import FusedBlock
from .embeddings import patches
from .multihead import attention_half, mask_of_heads
from .registry import LEFT_ALONE, Replacement, classes, outlives_restore, replaces

NORMS[known(transformer.LayerNorm)] = "layer_norm"
NORMS[known(transformer.LayerNormFp32)] = "layer_norm"
ACTIVATION_NAMES[known(transformer.QuickGELU)] = "quick_gelu"
LAYER_SCALES[known(transformer.LayerScale)] = "gamma"

for _layer in classes(transformer, "CustomResidualAttentionBlock"):
    LEFT_ALONE[_layer] = "its attention may compare by cosine and scale its heads, which no op does"


@replaces(transformer.ResidualAttentionBlock)
class ResidualAttentionBlock(FusedBlock, transformer.ResidualAttentionBlock):
    @outlives_restore
    def forward(self, q_x: Tensor, *args, **kwargs) -> Tensor:
        return FusedBlock.forward(self, q_x, *args, **kwargs)

    def gather(
        self,
        frozen: bool,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        if k_x is not None or v_x is not None:
            raise Unfused("its keys and values are of other tokens")
        norm = norm_arguments(self, "ln_1")
        attention = attention_half(self, "attn", norm, Branch(layer_scale(self, "ls_1"), frozen=frozen))
        mlp = plain_child(self, "mlp", (nn.Sequential,))
        arguments = _mlp_arguments(mlp, norm_arguments(self, "ln_2"))
        if attn_mask is not None:
            # As the block does: a mask of booleans becomes numbers, which are added.
            attn_mask = mask_of_heads(attn_mask.to(attention.qkv_weight.dtype), self.attn.num_heads)
        return (
            attention,
            MlpHalf(arguments, Branch(layer_scale(self, "ls_2"), frozen=frozen)),
            {"attn_mask": attn_mask},
        )


def _mlp_arguments(mlp: nn.Module, norm: NormArguments) -> dict:
    if list(mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        raise Unfused("its MLP has other layers than c_fc, gelu and c_proj")
    fc1, fc2 = plain_child(mlp, "c_fc", LINEARS), plain_child(mlp, "c_proj", LINEARS)
    return two_layers(norm, fc1, activation_name(mlp, "gelu"), fc2)


@replaces(transformer.VisionTransformer)
class VisionTransformer(Replacement, transformer.VisionTransformer):
    @outlives_restore
    def _embeds(self, x: Tensor) -> Tensor:
        with recording.inside("conv1"):
            try:
                arguments = VisionTransformer._embedding_arguments(self, x)
            except Unfused as reason:
                ran_its_own_forward(reason)
                return transformer.VisionTransformer._embeds(self, x)
            with Settings.of(self).context():
                tokens = ops.patch_embed(*arguments)
        return self.ln_pre(self.patch_dropout(tokens))

    def _embedding_arguments(self, images: Tensor) -> tuple:
        found = patches(self, "conv1", images)
        dtype = found.weight.dtype
        if compute_dtype(found.weight) != dtype:
            raise Unfused("under autocast it adds its positions in low precision")
        class_token = self.class_embedding.to(dtype).view(1, 1, -1)
        return found.arguments(self.positional_embedding.to(dtype)[None], class_token)
