"""The MLPs of vision transformers, with timm's arguments and parameter names.

``MLPS`` says for each class what `layer_norm_mlp` needs to compute the same thing; where only the module's
own forward will do (a hook inside, dropout at work, an unknown activation) that raises Unfused.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .activation import activation_name
from .norm import NormArguments, norm_arguments
from .plain import LINEARS, Unfused, idle_child, is_identity, known, plain_child, weight_and_bias


@known
class Mlp(nn.Module):
    """fc1, activation, fc2; an optional norm before fc2."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        (bias1, bias2), (drop1, drop2) = _pair(bias), _pair(drop)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **dd)
        self.drop2 = nn.Dropout(drop2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


@known
class GluMlp(nn.Module):
    """Gated MLP with one projection for value and gate (arXiv 2002.05202)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.Sigmoid,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        gate_last: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        if hidden_features % 2:
            raise ValueError(f"a gated MLP splits its hidden features in two; {hidden_features} is odd")
        (bias1, bias2), (drop1, drop2) = _pair(bias), _pair(drop)
        self.gate_last = gate_last
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features // 2, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features // 2, out_features, bias=bias2, **dd)
        self.drop2 = nn.Dropout(drop2)

    def init_weights(self) -> None:
        """A gate near one: its weights near zero, its bias one."""
        half = self.fc1.weight.shape[0] // 2
        with torch.no_grad():
            if self.fc1.bias is not None:
                nn.init.ones_(self.fc1.bias[half:])
            nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        x = first * self.act(second) if self.gate_last else self.act(first) * second
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


SwiGLUPacked = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)


@known
class SwiGLU(nn.Module):
    """Gated MLP with a projection each for value and gate (arXiv 2002.05202)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.SiLU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        align_to: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        (bias1, bias2), (drop1, drop2) = _pair(bias), _pair(drop)
        if align_to:
            hidden_features += -hidden_features % align_to
        self.fc1_g = nn.Linear(in_features, hidden_features, bias=bias1, **dd)
        self.fc1_x = nn.Linear(in_features, hidden_features, bias=bias1, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **dd)
        self.drop2 = nn.Dropout(drop2)

    def init_weights(self) -> None:
        """A gate near one: its weights near zero, its bias one."""
        if self.fc1_g.bias is not None:
            nn.init.ones_(self.fc1_g.bias)
        nn.init.normal_(self.fc1_g.weight, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def mlp_arguments(mlp: nn.Module, norm: NormArguments) -> dict:
    """`layer_norm_mlp`'s arguments for fc1, activation, fc2, behind this norm."""
    return _arguments(mlp, norm, plain_child(mlp, "fc1", LINEARS), activation_name(mlp))


def packed_swiglu_arguments(mlp: nn.Module, norm: NormArguments) -> dict:
    """The same for a gated MLP with one projection."""
    if mlp.gate_last:
        raise Unfused("its gate is the last half of the projection")
    return _arguments(mlp, norm, plain_child(mlp, "fc1", LINEARS), _swiglu(mlp))


def swiglu_arguments(mlp: nn.Module, norm: NormArguments) -> dict:
    """The same for a gated MLP with two projections."""
    gate, value = plain_child(mlp, "fc1_g", LINEARS), plain_child(mlp, "fc1_x", LINEARS)
    arguments = _arguments(mlp, norm, value, _swiglu(mlp))
    arguments["gate_weight"], arguments["gate_bias"] = weight_and_bias(gate)
    return arguments


def two_layers(norm: NormArguments, fc1: nn.Module, activation: str, fc2: nn.Module) -> dict:
    """The same of these plain layers, with no more between them."""
    weight, bias = weight_and_bias(fc1)
    norm.beside(weight)
    arguments = {"eps": norm.eps, "norm": norm.norm, "norm_weight": norm.weight, "norm_bias": norm.bias}
    arguments |= {"fc1_weight": weight, "fc1_bias": bias, "activation": activation}
    arguments["fc2_weight"], arguments["fc2_bias"] = weight_and_bias(fc2)
    return arguments


MLPS: dict[type[nn.Module], Callable[[nn.Module, NormArguments], dict]] = {
    Mlp: mlp_arguments,
    GluMlp: packed_swiglu_arguments,
    SwiGLU: swiglu_arguments,
}


def _swiglu(mlp: nn.Module) -> str:
    name = activation_name(mlp)
    if name != "silu":
        raise Unfused(f"its gate's activation is {name}")
    return "swiglu"


def _arguments(mlp: nn.Module, norm: NormArguments, fc1: nn.Module, activation: str) -> dict:
    """The arguments that all three share."""
    idle_child(mlp, "drop1")
    idle_child(mlp, "drop2")
    arguments = two_layers(norm, fc1, activation, plain_child(mlp, "fc2", LINEARS))
    if not is_identity(mlp._modules["norm"]):
        inner = norm_arguments(mlp, "norm")
        if inner.weight is None or (inner.norm, inner.eps) != (norm.norm, norm.eps):
            raise Unfused("its inner norm is not of the kind of the norm before it")
        arguments["inner_norm_weight"], arguments["inner_norm_bias"] = inner.weight, inner.bias
    return arguments


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
