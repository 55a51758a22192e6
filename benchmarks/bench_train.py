"""`fastvit bench train`: a model's forward, backward and whole step with AdamW, the providers interleaved.

A provider whose gradients miss the parity contract is shown as wrong, without a time. Memory is the most
that a GPU held for the gradients; on a CPU, what the forward pass keeps.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastvit
from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check

from . import roofline
from .bench_model import SETTLE, Subject, flops
from .harness import Row, Stopped, Timing, machine, measure, ratios
from .model_screen import Shown, progress
from .op_bench import at_its_best, in_words, peak_mb

DIRECTIONS = ("fwd", "bwd", "step")
# Products: forward once, and for the gradients of inputs and of weights once each.
PRODUCTS = {"fwd": 1, "bwd": 2, "step": 3}
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A provider: what is called, whose parameters are stepped."""

    call: Callable[[Tensor], Tensor]
    model: nn.Module

    def loss(self, x: Tensor) -> Tensor:
        return self.call(x).float().square().mean()

    def gradients(self, x: Tensor) -> Gradients:
        """Of every parameter, by name."""
        found = torch.autograd.grad(self.loss(x), list(self.model.parameters()))
        return dict(zip((name for name, _ in self.model.named_parameters()), found, strict=True))

    def calls(self, x: Tensor) -> dict[str, Callable[[], object]]:
        """What is timed, by direction."""
        parameters, loss = list(self.model.parameters()), self.loss(x)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(x).backward()
            optimizer.step()

        backward = lambda: torch.autograd.grad(loss, parameters, retain_graph=True)  # noqa: E731
        return {"fwd": lambda: self.loss(x), "bwd": backward, "step": step}


def providers(model: nn.Module, max_autotune: bool) -> dict[str, Trained]:
    """timm's own, compiled, and accelerated with `auto`'s backends, each with weights of its own."""
    given: dict[str, Callable[[nn.Module], Callable]] = {
        "timm eager": lambda own: own,
        "timm compiled": lambda own: torch.compile(own, dynamic=False),
        "fastvit": fastvit.accelerate,
        "fastvit compiled": lambda own: torch.compile(fastvit.accelerate(own), dynamic=False),
    }
    if max_autotune:
        tuned = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
        given["timm compiled, max-autotune"] = lambda own: torch.compile(own, **tuned)
    copies = {name: copy.deepcopy(model) for name in given}
    return {name: Trained(make(copies[name]), copies[name]) for name, make in given.items()}


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
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trained.loss(x)
    del loss
    return sum(kept.values()) / 1e6


def run(
    subject: Subject, max_autotune: bool, rounds: int, console: Console, keep: Callable[[Shown], None]
) -> None:
    """Judge the providers' gradients, time the right ones, and hand over each direction as it comes."""
    torch.compiler.reset()
    with at_its_best(), roofline.products_in(subject.dtype):
        model = subject.model().train()
        (x,) = subject.images(model, 1)
        given, absent = providers(model, max_autotune), {}
        judged = _judge(subject, model, given, x, absent, console)
        right = {name: given[name] for name, found in judged.items() if all(check.ok for check in found)}
        memory = {name: _memory(given[name], x) for name in judged}
        work, calls = flops(model, x), {name: trained.calls(x) for name, trained in right.items()}
        facts = {"op": subject.name, "dtype": subject.dtype, "batch": subject.batch_size}
        facts |= {"shape": x.shape[1:], "peak_tflops": roofline.peak_tflops(subject.device, subject.dtype)}
        wrong = {n: next(str(c) for c in found if not c.ok) for n, found in judged.items() if n not in right}

        def hand_over(direction: str, timings: dict[str, Timing]) -> None:
            made = Shown(f"{subject.title}: training, {direction}", wrong=wrong, absent=absent)
            for name in judged:
                own = {"provider": name, "ok": name in right, "peak_mb": memory[name], "direction": direction}
                own |= {"flops": PRODUCTS[direction] * work}
                made.rows.append(Row.of(timings.get(name), machine(), **facts | own))
            made.speeds = ratios(timings, next(iter(timings))) if timings else {}
            keep(made)

        for direction in DIRECTIONS:
            own = {name: by_direction[direction] for name, by_direction in calls.items()}
            try:
                with progress(f"timing {direction}", rounds + 2, console) as tick:
                    how = {"warmup": 2, "device": subject.device, "settle": SETTLE[subject.device.type]}
                    hand_over(direction, measure(own, rounds=rounds, on_round=tick, **how) if own else {})
            except Stopped as stop:
                hand_over(direction, stop.timings)
                raise


def _judge(
    subject: Subject,
    model: nn.Module,
    given: dict[str, Trained],
    x: Tensor,
    absent: dict[str, str],
    console: Console,
) -> dict[str, list[Check]]:
    """Each provider's checks; those that cannot run are told of in ``absent``."""
    truth = Trained(wide := copy.deepcopy(model).double(), wide).gradients(x.double())
    torchs, judged = [], {}
    for _, context in gemm_libraries(subject.device):
        with context():
            torchs.append(given["timm eager"].gradients(x))
    with progress("preparing", len(given), console) as step:
        for name, trained in given.items():
            step(name)
            try:
                judged[name] = checks(trained.gradients(x), truth, torchs)
            except Exception as error:  # a compiler raises its own for what it cannot do
                absent[name] = in_words(error)
    return judged


def _memory(trained: Trained, x: Tensor) -> float:
    """Of one step: on a GPU the peak, else what is saved."""
    if not x.is_cuda:
        return saved_mb(trained, x)
    return peak_mb(lambda: trained.gradients(x), x.device)
