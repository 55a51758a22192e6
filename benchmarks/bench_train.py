"""`fastvit bench train`: a model's forward, backward and whole step with AdamW, the providers interleaved.

A provider is judged by its gradients. Memory is the most that a GPU held for them; on a CPU, what the forward
pass keeps. One graph is alive at a time, so that a batch fits that fits by itself.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastvit
from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check

from .bench import peak_mb
from .bench_model import Subject, SubjectBench, flops
from .harness import Call, Row, Timing
from .model_screen import progress
from .outputs import Outputs

DIRECTIONS = ("fwd", "bwd", "step")
# Products: forward once, and for the gradients of inputs and of weights once each.
PRODUCTS = {"fwd": 1, "bwd": 2, "step": 3}
SLICE = 16  # images whose graph in float64 is held at a time
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A provider: what is called, whose parameters are stepped."""

    call: Callable[[Tensor], Tensor]
    model: nn.Module

    def loss(self, x: Tensor) -> Tensor:
        out = self.call(x)
        return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()

    def gradients(self, x: Tensor) -> Gradients:
        """Of every parameter, by name."""
        found = torch.autograd.grad(self.loss(x), list(self.model.parameters()))
        return dict(zip((name for name, _ in self.model.named_parameters()), found, strict=True))

    def calls(self, x: Tensor) -> dict[str, Call]:
        """What is timed, by direction."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(x).backward()
            optimizer.step()

        return {"fwd": lambda: self.loss(x), "bwd": Backward(self, x), "step": step}


class Backward:
    """The backward pass alone, once after each `before`, which builds its graph."""

    def __init__(self, trained: Trained, x: Tensor) -> None:
        self.trained, self.x, self.loss = trained, x, None

    def before(self) -> None:
        self.loss = self.trained.loss(self.x)

    def __call__(self) -> None:
        loss, self.loss = self.loss, None
        torch.autograd.grad(loss, list(self.trained.model.parameters()))


Maker = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def providers(max_autotune: bool) -> dict[str, Maker]:
    """timm's own, compiled, and accelerated with `auto`'s backends: of a model that they may change."""
    given: dict[str, Maker] = {
        "timm eager": lambda own: own,
        "timm compiled": lambda own: torch.compile(own, dynamic=False),
        "fastvit": fastvit.accelerate,
        "fastvit compiled": lambda own: torch.compile(fastvit.accelerate(own), dynamic=False),
    }
    if max_autotune:
        tuned = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
        given["timm compiled, max-autotune"] = lambda own: torch.compile(own, **tuned)
    return given


def exact(model: nn.Module, x: Tensor) -> Gradients:
    """In float64, which no GPU has the memory for at once.

    The loss is a mean over images, so its gradients are the slices' in proportion to their images; batch
    norms' are not.
    """
    wide = copy.deepcopy(model).double()
    whole = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in wide.modules())
    found = {name: torch.zeros_like(parameter) for name, parameter in wide.named_parameters()}
    for part in x.split(len(x) if whole else SLICE):
        for name, gradient in Trained(wide, wide).gradients(part.double()).items():
            found[name].add_(gradient, alpha=len(part) / len(x))
    return found


def checks(found: Gradients, truth: Gradients, torchs: list[Gradients]) -> list[Check]:
    """Each gradient by float64 and by torch's own."""
    return [
        judge(name, gradient, truth[name], [own[name] for own in torchs], kind="model", backward=True)
        for name, gradient in found.items()
    ]


def saved_mb(trained: Trained, x: Tensor) -> float:
    """What the forward pass keeps for backward, each storage once, in 10^6 bytes, without the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in trained.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own graph keeps would keep the graph

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trained.loss(x)
    del loss
    return sum(kept.values()) / 1e6


class TrainBench(SubjectBench):
    """Providers of a subject's training, each on weights of its own."""

    def __init__(
        self, subject: Subject, makers: dict[str, Maker], rounds: int, console: Console, kept: Outputs
    ) -> None:
        super().__init__(subject, "training", DIRECTIONS, rounds, console, kept)
        self.makers = makers

    def begin(self) -> None:
        self.model = self.subject.model().train()
        (self.x,) = self.subject.images(1)
        self.work, self.truth = flops(self.model, self.x), exact(self.model, self.x)
        self.torchs = []
        for _, context in gemm_libraries(self.device):
            with context():
                self.torchs.append(Trained(self.model, self.model).gradients(self.x))

    def prepare(self, name: str) -> dict[str, Call]:
        own = copy.deepcopy(self.model)
        with progress("preparing", 1, self.console) as step:
            step(name)
            trained = Trained(self.makers[name](own), own)
            self.checks[name] = checks(trained.gradients(self.x), self.truth, self.torchs)
            self.peaks[name] = _memory(trained, self.x)
        return trained.calls(self.x)

    def measure(self, direction: str, calls: dict[str, Call], **how: Any) -> dict[str, Timing]:
        if direction == "bwd":
            how["before"] = {name: call.before for name, call in calls.items()}
        return super().measure(direction, calls, **how)

    def row(self, timing: Timing | None, **facts: Any) -> Row:
        return super().row(timing, flops=self.work and PRODUCTS[facts["direction"]] * self.work, **facts)


def run(subject: Subject, makers: dict[str, Maker], rounds: int, console: Console, kept: Outputs) -> None:
    """Judge the providers' gradients, time the right ones, and keep what came of it."""
    TrainBench(subject, makers, rounds, console, kept).run_and_show(makers, {})


def _memory(trained: Trained, x: Tensor) -> float:
    """Of one step: on a GPU the peak, else what is saved."""
    if not x.is_cuda:
        return saved_mb(trained, x)
    return peak_mb(lambda: trained.gradients(x), x.device)
