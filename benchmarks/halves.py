"""What the benchmarks of the GEMM halves share: sizes, inputs, and the providers that every half has."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops, use_backend

from .op_bench import DIRECTIONS, Case, Inputs, Provider, Results, compiled, differentiated
from .op_peers import peers

TOKENS = 197
WIDTHS = {"cpu": (384, 768), "cuda": (384, 768, 1024)}
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64, 256)}
# Forward, the gradients of input and weight, both.
PRODUCTS = {"fwd": 1, "bwd": 2, "step": 3}


@dataclass(frozen=True)
class Half(Case):
    """Half a block on B images of N tokens of D channels."""

    tokens: int
    width: int
    # Sizes of the weights and vectors by name, as multiples of D.
    weights: ClassVar[dict[str, tuple[int, ...]]]
    # Tokens read or written, as multiples of D elements: forward; and in the backward beside it.
    passes: ClassVar[dict[str, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.width

    @property
    def title(self) -> str:
        return f"{self.op} {self.direction} {self.dtype} B={self.batch} N={self.tokens} D={self.width}"

    @property
    def trained(self) -> tuple[str, ...]:
        return self.streams + tuple(self.weights)

    @property
    def streams(self) -> tuple[str, ...]:
        """The inputs that are tokens [B, N, D]."""
        return ("x",)

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def weight_elements(self) -> int:
        return (
            sum(a * b for a, b in filter(lambda size: len(size) == 2, self.weights.values())) * self.width**2
        )

    @property
    def flops(self) -> float:
        return 2 * PRODUCTS[self.direction] * self.rows * self.weight_elements

    @property
    def bytes_moved(self) -> float:
        weights = {"fwd": 1, "bwd": 2, "step": 3}[self.direction] * self.weight_elements
        return (self.passes[self.direction] * self.rows * self.width + weights) * self.torch_dtype.itemsize

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        of = partial(torch.randn, generator=generator, device=device)
        given = {name: of(self.batch, self.tokens, self.width) for name in self.streams}
        for name, size in self.weights.items():
            sizes = [part * self.width for part in size]
            # Of the size that training gives: products of unit variance, norms near one.
            given[name] = of(sizes) * sizes[-1] ** -0.5 if len(sizes) == 2 else 0.1 * of(sizes)
            if name == "norm_weight":
                given[name] += 1
        given["grad"] = of(self.batch, self.tokens, self.out_width)
        return {name: tensor.to(self.torch_dtype) for name, tensor in given.items()}

    @property
    def out_width(self) -> int:
        return self.width

    @abstractmethod
    def reference(self, **inputs: Tensor) -> Tensor: ...

    def uncancelled(self, grad: Tensor, **inputs: Tensor) -> Results:
        """None of it: products of such numbers do not cancel, and gradients are judged as they are."""
        return differentiated(self.reference)(self, {"grad": grad, **inputs})()

    def parts(self, results: Results) -> dict[str, tuple[Tensor, str]]:
        named = {} if self.direction == "bwd" else {"out": (results[0], "gemm")}
        if self.direction != "fwd":
            # Of parameters too: torch's own are over the ceiling that kernels are held to in half precision.
            gradients = zip(self.trained, results[-len(self.trained) :], strict=True)
            named |= {f"d{name}": (gradient, "gemm") for name, gradient in gradients}
        return named


class _Frozen(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], weights: Inputs) -> None:
        super().__init__()
        self.function, self.names = forward, tuple(weights)
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, **streams: Tensor) -> Tensor:
        return self.function(**streams, **{name: getattr(self, name) for name in self.names})


def frozen(case: Half, inputs: Inputs) -> Callable[[], Results]:
    """torch.compile with freezing: weights are constants that the compiler folds and packs."""
    streams = {name: inputs[name] for name in case.streams}
    module = _Frozen(case.reference, {name: inputs[name] for name in case.weights}).eval()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        run = torch.compile(module, fullgraph=True, dynamic=False)
        run(**streams)
    return torch.no_grad()(lambda: (run(**streams),))


def on_backend(case: Half, backend: str) -> Callable[..., Tensor]:
    def forward(**inputs: Tensor) -> Tensor:
        with use_backend(backend):
            return getattr(ops, case.op)(**inputs)

    return forward


def providers(case: Half, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    """torch eager as the baseline, fastvit on this device's library, torch.compile."""
    backend, other = ("cuda", "cpp") if device.type == "cuda" else ("cpp", "cuda")
    given = {
        "eager": differentiated(case.reference),
        f"fastvit {backend}": differentiated(on_backend(case, backend)),
        "compiled": compiled(case.reference),
    }
    if case.direction == "fwd":
        kept = partial(on_backend(case, backend), frozen=True)
        given[f"fastvit {backend}, frozen"] = differentiated(kept)
    if device.type == "cpu" and case.direction == "fwd":
        given["compiled, frozen"] = frozen
    others, absent = peers(case.op, device)
    given |= {name: differentiated(forward) for name, forward in others.items()}
    return given, absent | {f"fastvit {other}": f"it is for {'CPUs' if other == 'cpp' else 'CUDA GPUs'}"}


def sizes(
    device: torch.device, quick: bool, dtypes: tuple[str, ...]
) -> Iterator[tuple[str, str, int, int, int]]:
    """Direction, dtype, batch, tokens and width: ViT-S, -B and -L at 224 pixels."""
    widths, batches = WIDTHS[device.type], BATCHES[device.type]
    if quick:
        dtypes, widths, batches = dtypes[:1], (768,), batches[:1] if device.type == "cpu" else (1, 64)
    for dtype, width, batch, direction in product(dtypes, widths, batches, DIRECTIONS):
        yield direction, dtype, batch, TOKENS, width
