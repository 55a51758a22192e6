"""What is otherwise in transformers 4 (4.57): attention and MLP in two modules each, CLIP's two masks."""

import inspect
from types import ModuleType

from torch import Tensor, nn

from ...layers.activation import activation_name
from ...layers.halves import AttentionHalf, Branch, MlpHalf
from ...layers.mlp import MLPS, two_layers
from ...layers.norm import NormArguments, norm_arguments
from ...layers.plain import LINEARS, Unfused, idle_child, known, plain_child, weight_and_bias
from ...layers.regularization import DROP_PATHS, layer_scale
from ..joined import joined_projections
from ..registry import outlives_restore
from .layer import ATTENTIONS, CLIP, DINO, VIT, AttentionNames, Layer, between_projections, mask_options

ATTENTION4 = AttentionNames(dropout="dropout_prob")
# Modules that hold what the ops compute, by what they are in a layer.
HOLDERS: dict[type[nn.Module], None] = {}


def enter4(module: ModuleType, prefix: str) -> None:
    """Enter the classes of a model, whose names begin with ``prefix``.

    Raises:
        ImportError: for versions whose layers return attention weights too.
    """
    if "output_attentions" in inspect.signature(getattr(module, f"{prefix}Layer").forward).parameters:
        raise ImportError(f"{prefix}Layer returns attention weights: fastvit knows transformers from 4.57 on")
    ATTENTIONS[known(getattr(module, f"{prefix}SelfAttention"))] = ATTENTION4
    for name in ("Attention", "SelfOutput", "Intermediate", "Output"):
        if hasattr(module, prefix + name):
            HOLDERS[known(getattr(module, prefix + name))] = None


def attention_half4(layer: nn.Module, norm: NormArguments, branch: Branch) -> tuple[AttentionHalf, dict]:
    """The half of a layer's ``attention``, and the op's options."""
    holder = plain_child(layer, "attention", HOLDERS)
    attn, output = plain_child(holder, "attention", ATTENTIONS), plain_child(holder, "output", HOLDERS)
    idle_child(output, "dropout")
    names = ("query", "key", "value")
    weight, bias = joined_projections([plain_child(attn, name, LINEARS) for name in names])
    out = weight_and_bias(plain_child(output, "dense", LINEARS))
    between, options = between_projections(attn, ATTENTION4), mask_options(attn, None, False)
    return AttentionHalf(norm.beside(weight), weight, bias, between, *out, branch), options


class ViTLayer4(Layer):
    """Mixed into a layer of ViT and its kin."""

    parts = VIT

    def gather(self, frozen: bool, head_mask: Tensor | None = None) -> tuple[AttentionHalf, MlpHalf, dict]:
        if head_mask is not None:
            raise Unfused("heads are masked")
        attention, options = attention_half4(
            self, norm_arguments(self, self.parts.norm1), Branch(frozen=frozen)
        )
        first, output = (plain_child(self, name, HOLDERS) for name in ("intermediate", "output"))
        idle_child(output, "dropout")
        activation = activation_name(first, "intermediate_act_fn")
        fc1, fc2 = plain_child(first, "dense", LINEARS), plain_child(output, "dense", LINEARS)
        arguments = two_layers(norm_arguments(self, self.parts.norm2), fc1, activation, fc2)
        return attention, MlpHalf(arguments, Branch(frozen=frozen)), options


class Dinov2Layer4(Layer):
    """Mixed into a layer of DINOv2, with registers or without."""

    parts = DINO

    def gather(self, frozen: bool, head_mask: Tensor | None = None) -> tuple[AttentionHalf, MlpHalf, dict]:
        if head_mask is not None:
            raise Unfused("heads are masked")
        drop_path = plain_child(self, "drop_path", DROP_PATHS)
        first, second = (Branch(layer_scale(self, f"layer_scale{n}"), drop_path, frozen) for n in (1, 2))
        attention, options = attention_half4(self, norm_arguments(self, "norm1"), first)
        mlp = plain_child(self, "mlp", MLPS)
        arguments = MLPS[type(mlp)](mlp, norm_arguments(self, "norm2"))
        return attention, MlpHalf(arguments, second), options


def packed_swiglu4(module: nn.Module, norm: NormArguments) -> dict:
    """`layer_norm_mlp`'s arguments for DINOv2's gated MLP, the gate's half first."""
    fc1, fc2 = (plain_child(module, name, LINEARS) for name in ("weights_in", "weights_out"))
    return two_layers(norm, fc1, "swiglu", fc2)


class ClipLayer4(Layer):
    """Mixed into a layer of CLIP, which returns a tuple."""

    parts = CLIP

    @outlives_restore
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple:
        out = Layer.forward(self, hidden_states, *args, **kwargs)
        return (out,) if isinstance(out, Tensor) else out

    def gather(
        self,
        frozen: bool,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        masks = [mask for mask in (attention_mask, causal_attention_mask) if mask is not None]
        # Both are numbers, and added as they are added to the logits.
        mask = masks[0] + masks[1] if len(masks) == 2 else (masks or [None])[0]
        return super().gather(frozen, mask, is_causal=False, output_attentions=output_attentions)
