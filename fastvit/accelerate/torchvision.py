"""torchvision's VisionTransformer and its block."""

from torch import Tensor, nn
from torchvision.models import vision_transformer

from .. import ops, recording
from ..layers.activation import activation_name
from ..layers.halves import AttentionHalf, Branch, MlpHalf
from ..layers.mlp import two_layers
from ..layers.norm import NormArguments, norm_arguments
from ..layers.plain import LINEARS, Unfused, idle_child, known, plain_child, ran_its_own_forward
from ..layers.settings import Settings
from .blocks import FusedBlock
from .embeddings import patches
from .multihead import attention_half
from .registry import Replacement, outlives_restore, replaces

MLPS = (known(vision_transformer.MLPBlock),)
ENCODERS = (known(vision_transformer.Encoder),)


@replaces(vision_transformer.EncoderBlock)
class EncoderBlock(FusedBlock, vision_transformer.EncoderBlock):
    @outlives_restore
    def forward(self, input: Tensor) -> Tensor:
        return FusedBlock.forward(self, input)

    def gather(self, frozen: bool) -> tuple[AttentionHalf, MlpHalf, dict]:
        idle_child(self, "dropout")
        attention = attention_half(
            self, "self_attention", norm_arguments(self, "ln_1"), Branch(frozen=frozen)
        )
        mlp = plain_child(self, "mlp", MLPS)
        return (
            attention,
            MlpHalf(_mlp_arguments(mlp, norm_arguments(self, "ln_2")), Branch(frozen=frozen)),
            {},
        )


def _mlp_arguments(mlp: nn.Module, norm: NormArguments) -> dict:
    """A Sequential: linear, activation, dropout, linear, dropout."""
    if list(mlp._modules) != list("01234"):
        raise Unfused("its MLP has more or fewer layers than two")
    idle_child(mlp, "2")
    idle_child(mlp, "4")
    fc1, fc2 = plain_child(mlp, "0", LINEARS), plain_child(mlp, "3", LINEARS)
    return two_layers(norm, fc1, activation_name(mlp, "1"), fc2)


@replaces(vision_transformer.VisionTransformer)
class VisionTransformer(Replacement, vision_transformer.VisionTransformer):
    @outlives_restore
    def forward(self, x: Tensor) -> Tensor:
        tokens = VisionTransformer._tokens(self, x)
        if tokens is None:
            return vision_transformer.VisionTransformer.forward(self, x)
        encoder = self.encoder
        return self.heads(encoder.ln(encoder.layers(encoder.dropout(tokens)))[:, 0])

    def _tokens(self, images: Tensor) -> Tensor | None:
        """What enters the encoder's dropout; None where the original forward is to run."""
        with recording.inside("conv_proj"):
            try:
                arguments = VisionTransformer._embedding_arguments(self, images)
            except Unfused as reason:
                ran_its_own_forward(reason)
                return None
            with Settings.of(self).context():
                return ops.patch_embed(*arguments)

    def _embedding_arguments(self, images: Tensor) -> tuple:
        """`patch_embed`'s: the positions are the encoder's, whose forward is passed by."""
        encoder = plain_child(self, "encoder", ENCODERS)
        found = patches(self, "conv_proj", images)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            raise Unfused("the images are not of the model's size")
        return found.arguments(encoder.pos_embedding, self.class_token)
