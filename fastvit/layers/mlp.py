"""The MLPs of vision transformers, with timm's arguments and parameter names.

``op_arguments`` gives what `layer_norm_mlp` needs to compute the same thing, or None where only the
module's own forward will do (a hook inside, dropout at work, an unknown activation).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .activation import activation_name
from .norm import NormArguments, norm_arguments
from .plain import is_identity, is_plain, known, weight_and_bias


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

    def op_arguments(self, norm: NormArguments) -> dict | None:
        fc1, activation = self._modules["fc1"], activation_name(self._modules["act"])
        if activation is None or not is_plain(self, Mlp) or not is_plain(fc1, nn.Linear):
            return None
        return _common_arguments(self, norm, fc1, activation)


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

    def op_arguments(self, norm: NormArguments) -> dict | None:
        fc1 = self._modules["fc1"]
        if self.gate_last or activation_name(self._modules["act"]) != "silu":
            return None
        if not is_plain(self, GluMlp) or not is_plain(fc1, nn.Linear):
            return None
        return _common_arguments(self, norm, fc1, "swiglu")


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

    def op_arguments(self, norm: NormArguments) -> dict | None:
        gate, value = self._modules["fc1_g"], self._modules["fc1_x"]
        if activation_name(self._modules["act"]) != "silu" or not is_plain(self, SwiGLU):
            return None
        if not is_plain(gate, nn.Linear) or not is_plain(value, nn.Linear):
            return None
        arguments = _common_arguments(self, norm, value, "swiglu")
        if arguments is not None:
            arguments["gate_weight"], arguments["gate_bias"] = weight_and_bias(gate)
        return arguments


def _common_arguments(mlp: nn.Module, norm: NormArguments, fc1: nn.Linear, activation: str) -> dict | None:
    """The arguments that all three share, or None if dropout, fc2 or the inner norm stands in the way."""
    parts = mlp._modules
    fc2, inner_norm = parts["fc2"], parts["norm"]
    if not (is_identity(parts["drop1"]) and is_identity(parts["drop2"]) and is_plain(fc2, nn.Linear)):
        return None
    arguments = {"eps": norm.eps, "norm": norm.norm, "norm_weight": norm.weight, "norm_bias": norm.bias}
    arguments["fc1_weight"], arguments["fc1_bias"] = weight_and_bias(fc1)
    arguments["fc2_weight"], arguments["fc2_bias"] = weight_and_bias(fc2)
    if norm.weight is not None and norm.weight.dtype != arguments["fc1_weight"].dtype:
        return None
    arguments["activation"] = activation
    if not is_identity(inner_norm):
        inner = norm_arguments(inner_norm)
        if inner is None or inner.weight is None or (inner.norm, inner.eps) != (norm.norm, norm.eps):
            return None
        arguments["inner_norm_weight"], arguments["inner_norm_bias"] = inner.weight, inner.bias
    return arguments


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
