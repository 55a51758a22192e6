"""A call of an op as a model made it, as a benchmark's case: random tensors of the same kinds."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit import ops, reference, use_backend
from fastvit.verification import GEMM_OPS

from .op_bench import Case, Inputs, Results, differentiated

# How large numbers are: a norm's or LayerScale's are near one, weights give products of unit variance.
NEAR_ONE = (
    "norm_weight",
    "q_norm_weight",
    "k_norm_weight",
    "inner_norm_weight",
    "layer_scale",
    "sample_scale",
)


@dataclass(frozen=True)
class Kind:
    """What is known of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)


@dataclass(frozen=True)
class Recorded(Case):
    """An op with its tensors by name and its other arguments."""

    named: str
    tensors: tuple[tuple[str, Kind], ...]
    options: tuple[tuple[str, Any], ...]
    frozen: bool = False  # of the op alone: its reference keeps nothing

    @classmethod
    def of(cls, op: str, args: tuple, kwargs: dict[str, Any], direction: str, dtype: str) -> "Recorded":
        """From the arguments that its reference takes."""
        frozen = kwargs.get("frozen", False) and direction == "fwd"
        kwargs = {name: value for name, value in kwargs.items() if name != "frozen"}
        given = _apart(inspect.signature(getattr(reference, op)).bind(*args, **kwargs).arguments)
        tensors = {name: Kind.of(value) for name, value in given.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in given.items() if name not in tensors}
        if op == "attention":  # on the packed projection that its views are of
            q, *_ = (tensors.pop(name) for name in "qkv")
            batch, tokens, options["num_heads"], head_dim = q.shape
            width = 3 * options["num_heads"] * head_dim
            packed = Kind((batch, tokens, width), (tokens * width, width, 1), q.dtype, q.trained)
            tensors = {"qkv": packed, **tensors}
        batch = next(iter(tensors.values())).shape[0]
        named = tuple(tensors.items()), tuple(sorted(options.items()))
        return cls(direction, dtype, batch, op, *named, frozen)

    @property
    def op(self) -> str:
        return self.named

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(name for name, kind in self.tensors if kind.trained)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[0][1].shape

    @property
    def title(self) -> str:
        return f"{self.op} {self.direction} {self.dtype} {list(self.shape)}"

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def bytes_moved(self) -> float:
        return 0.0

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        given = {name: _drawn(name, kind, generator, device) for name, kind in self.tensors}
        out = self.reference(**{name: tensor.to("meta") for name, tensor in given.items()})
        given["grad"] = torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
        return given

    def reference(self, **inputs: Tensor) -> Tensor:
        given = _together(inputs | dict(self.options))
        if self.op == "attention":
            heads = given.pop("num_heads")
            given |= zip("qkv", given.pop("qkv").unflatten(-1, (3, heads, -1)).unbind(2), strict=True)
        return getattr(reference, self.op)(**given)

    def on(self, backend: str) -> Callable[..., Tensor]:
        """The op on this backend, called as the reference is."""

        frozen = {"frozen": True} if self.frozen else {}

        def forward(**inputs: Tensor) -> Tensor:
            with use_backend(**{self.op: backend}):
                return getattr(ops, self.op)(**_together(inputs | dict(self.options)), **frozen)

        return forward

    def uncancelled(self, grad: Tensor, **inputs: Tensor) -> Results:
        """None of it: such numbers do not cancel, and results are judged as they are."""
        return differentiated(self.reference)(self, {"grad": grad, **inputs})()

    def parts(self, results: Results) -> dict[str, tuple[Tensor, str]]:
        kind = "gemm" if self.op in GEMM_OPS else "op"
        named = {} if self.direction == "bwd" else {"out": (results[0], kind)}
        if self.direction == "fwd":
            return named
        for name, gradient in zip(self.trained, results[-len(self.trained) :], strict=True):
            if name == "qkv":
                dq, dk, dv = gradient.chunk(3, dim=-1)
                named |= {"dq": (dq, "dq"), "dk": (dk, "op"), "dv": (dv, "op")}
            else:
                named[f"d{name}"] = (gradient, "gemm" if self.op in GEMM_OPS else "param_grad")
        return named


def _apart(given: dict[str, Any]) -> dict[str, Any]:
    """With each of several weights, and of their biases, by a name of its own: "weight.0", "weight.1"."""
    found = {}
    for name, value in given.items():
        several = isinstance(value, tuple) and name in ("weight", "bias")
        found |= {f"{name}.{i}": one for i, one in enumerate(value)} if several else {name: value}
    return found


def _together(given: dict[str, Any]) -> dict[str, Any]:
    """The other way round."""
    found: dict[str, Any] = {}
    for name, value in sorted(given.items()):
        whole, part, _ = name.partition(".")
        found[whole] = (*found.get(whole, ()), value) if part else value
    return found


def _drawn(name: str, kind: Kind, generator: torch.Generator, device: torch.device) -> Tensor:
    out = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=device)
    if kind.dtype == torch.bool:
        return out.copy_(torch.rand(kind.shape, generator=generator, device=device) > 0.1)
    if kind.dtype == torch.uint8:
        return out.copy_(torch.randint(0, 256, kind.shape, generator=generator, device=device))
    values = torch.randn(kind.shape, generator=generator, device=device)
    if name in NEAR_ONE:
        values = 1 + 0.1 * values
    elif name.partition(".")[0].endswith(("weight", "bias")):
        values *= values[0].numel() ** -0.5 if values.ndim > 1 else 0.1
    return out.copy_(values)
