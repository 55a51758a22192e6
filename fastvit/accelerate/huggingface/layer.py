"""The pre-norm layer that transformers' vision models share: separate projections, options, masks."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...layers.activation import activation_name
from ...layers.attention import BetweenProjections
from ...layers.halves import AttentionHalf, Branch, MlpHalf
from ...layers.mlp import MLPS, two_layers
from ...layers.norm import NormArguments, norm_arguments
from ...layers.plain import LINEARS, Unfused, idle_child, plain_child, weight_and_bias
from ...layers.regularization import DROP_PATHS, layer_scale
from ..blocks import FusedBlock
from ..joined import joined_projections
from ..registry import outlives_restore
from . import activations  # noqa: F401 (it enters them)
from .attention import attention_forward
from .sdpa import READ_BY_SDPA


class AttentionNames(NamedTuple):
    """How a class of attention modules names what all of them have."""

    num_heads: str = "num_attention_heads"
    scale: str = "scaling"
    dropout: str = "attention_dropout"
    out: str = "o_proj"


class Parts(NamedTuple):
    """How a class of layers names its modules; None for what it has not."""

    norm1: str
    attention: str
    norm2: str
    mlp: str = "mlp"
    layer_scale1: str | None = None
    layer_scale2: str | None = None
    drop_path: str | None = None
    dropout: str | None = None


ATTENTIONS: dict[type[nn.Module], AttentionNames] = {}
CLIP_ATTENTION = AttentionNames("num_heads", "scale", "dropout", "out_proj")

VIT = Parts("layernorm_before", "attention", "layernorm_after", dropout="dropout")
CLIP = Parts("layer_norm1", "self_attn", "layer_norm2")
DINO = Parts(
    *("norm1", "attention", "norm2"),
    layer_scale1="layer_scale1",
    layer_scale2="layer_scale2",
    drop_path="drop_path",
)


class Layer(FusedBlock):
    """Mixed into a layer with parts by these names."""

    parts: ClassVar[Parts]

    @outlives_restore
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return FusedBlock.forward(self, hidden_states, *args, **kwargs)

    def gather(
        self,
        frozen: bool,
        attention_mask: Tensor | None = None,
        *,
        is_causal: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool | int | list[int] = False,
        **others,
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        parts = self.parts
        if read := READ_BY_SDPA.intersection(others):
            raise Unfused(f"it is called with {', '.join(sorted(read))}")
        if output_attentions:
            raise Unfused("its attention weights are asked for")
        if parts.dropout is not None:
            idle_child(self, parts.dropout)
        attn = plain_child(self, parts.attention, ATTENTIONS)
        options = mask_options(attn, attention_mask, is_causal)
        drop_path = None if parts.drop_path is None else plain_child(self, parts.drop_path, DROP_PATHS)
        first, second = (
            Branch(None if name is None else layer_scale(self, name), drop_path, frozen)
            for name in (parts.layer_scale1, parts.layer_scale2)
        )
        attention = attention_half(attn, norm_arguments(self, parts.norm1), first)
        mlp = plain_child(self, parts.mlp, MLPS)
        arguments = MLPS[type(mlp)](mlp, norm_arguments(self, parts.norm2))
        return attention, MlpHalf(arguments, second), options


class LayerWithoutOptions(Layer):
    """The same where the attention module drops whatever else the layer is called with."""

    def gather(
        self, frozen: bool, attention_mask: Tensor | None = None, output_attentions: bool = False, **_
    ) -> tuple[AttentionHalf, MlpHalf, dict]:
        return super().gather(frozen, attention_mask, output_attentions=output_attentions)


def attention_half(attn: nn.Module, norm: NormArguments, branch: Branch) -> AttentionHalf:
    """The half with this plain attention module, whose projections are apart."""
    names = ATTENTIONS[type(attn)]
    weight, bias = joined_projections([plain_child(attn, f"{part}_proj", LINEARS) for part in "qkv"])
    out = weight_and_bias(plain_child(attn, names.out, LINEARS))
    between = between_projections(attn, names)
    return AttentionHalf(norm.beside(weight), weight, bias, between, *out, branch)


def between_projections(attn: nn.Module, names: AttentionNames) -> BetweenProjections:
    """What this plain attention module computes between its projections."""
    dropout_p = getattr(attn, names.dropout) if attn.training else 0.0
    return BetweenProjections(getattr(attn, names.num_heads), getattr(attn, names.scale), dropout_p)


def mask_options(attn: nn.Module, mask: Tensor | None, is_causal: bool | None) -> dict:
    """The op's arguments for what the module's attention function makes of these.

    Raises:
        Unfused: for another function than transformers' "eager", its "sdpa", and ours; and for a mask or a
            dropout that "eager" treats in its own way.
    """
    implementation = attn.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    eager = function is None and implementation in (None, "eager")
    if not eager and function not in (sdpa_attention_forward, attention_forward):
        raise Unfused(f"attention is computed by {implementation}")
    if eager and attn.training and getattr(attn, ATTENTIONS[type(attn)].dropout):
        raise Unfused("eager attention drops weights, by draws of its own")
    if mask is not None:
        if eager:
            # Its mask is the least number that there is: a row that sees no key gives the mean of all values,
            # and its gradients; in half precision, where logits are rounded, more than that is its own.
            raise Unfused("eager attention adds a mask, in a way of its own")
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
            raise Unfused("attention_mask is not [N, N], nor up to [B, H, N, N]")
        if not (mask.is_floating_point() or mask.dtype == torch.bool):
            raise Unfused(f"attention_mask is {mask.dtype}")
    is_causal = attn.is_causal if is_causal is None else is_causal
    return {"attn_mask": mask, "is_causal": bool(is_causal) and mask is None and not eager}


def mlp(first: str, activation: str, second: str, gate: str | None = None):
    """What MLPS holds for a class with layers of these names."""

    def arguments(module: nn.Module, norm: NormArguments) -> dict:
        name = activation_name(module, activation)
        fc1, fc2 = plain_child(module, first, LINEARS), plain_child(module, second, LINEARS)
        if gate is None:
            return two_layers(norm, fc1, name, fc2)
        if name != "silu":
            raise Unfused(f"its gate's activation is {name}")
        gate_weight, gate_bias = weight_and_bias(plain_child(module, gate, LINEARS))
        return two_layers(norm, fc1, "swiglu", fc2) | {"gate_weight": gate_weight, "gate_bias": gate_bias}

    return arguments


def uniform_scale(drop_path: nn.Module, x: Tensor) -> Tensor:
    """What `sample_scale` draws for transformers' stochastic depth, as it does."""
    keep = 1 - drop_path.drop_prob
    return torch.rand(x.shape[0], dtype=x.dtype, device=x.device).add_(keep).floor_().div_(keep)


FC_MLP = mlp("fc1", "activation_fn", "fc2")
UP_MLP = mlp("up_proj", "act_fn", "down_proj")
GATED_MLP = mlp("up_proj", "act_fn", "down_proj", gate="gate_proj")
