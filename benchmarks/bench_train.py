"""A model's training step: `python -m fastvit_benchmarks.bench_train vit_small_patch16_224 --batch-size 8`.

timm eager, torch.compile and fastvit, forward, backward and the whole step with AdamW apart, interleaved,
with what the forward pass keeps. A provider whose gradients miss the parity contract is shown as wrong,
without a time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastvit
from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check
from fastvit.verification import randomize

from .harness import Row, machine, measure, ratios, save
from .model_screen import show

DIRECTIONS = ("fwd", "bwd", "step")
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


def providers(model: nn.Module) -> dict[str, Trained]:
    """timm's own, compiled, and accelerated with `auto`'s backends, each with weights of its own."""
    eager, compiled, fast = (copy.deepcopy(model) for _ in range(3))
    return {
        "timm eager": Trained(eager, eager),
        "timm compiled": Trained(torch.compile(compiled), compiled),
        "fastvit": Trained(fastvit.accelerate(fast), fast),
    }


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


def rows(
    name: str, batch_size: int, dtype: str, device: torch.device, rounds: int, console: Console
) -> list[Row]:
    """Every provider in every direction."""
    model = randomize(timm.create_model(name)).to(device, getattr(torch, dtype)).train()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    x = torch.randn(batch_size, *size).to(device, getattr(torch, dtype))
    here, given, judged = machine(), providers(model), {}
    truth = Trained(wide := copy.deepcopy(model).double(), wide).gradients(x.double())
    torchs = []
    for _, context in gemm_libraries(device):
        with context():
            torchs.append(given["timm eager"].gradients(x))
    for provider in track(given, "judging", console=console, transient=True):
        judged[provider] = checks(given[provider].gradients(x), truth, torchs)
    memory = {provider: saved_mb(trained, x) for provider, trained in given.items()}
    right = [provider for provider, found in judged.items() if all(check.ok for check in found)]
    calls = {provider: given[provider].calls(x) for provider in right}
    found = []
    for direction in track(DIRECTIONS, "timing", console=console, transient=True):
        timings = measure({p: calls[p][direction] for p in right}, rounds=rounds, warmup=2, device=device)
        speeds = ratios(timings, right[0])
        for provider, timing in timings.items():
            facts = {"op": name, "provider": provider, "dtype": dtype, "shape": size, "batch": batch_size}
            row = Row.of(timing, here, ok=True, direction=direction, peak_mb=memory[provider], **facts)
            found.append((row, speeds[provider]))
    wrong = {p: next(str(c) for c in found if not c.ok) for p, found in judged.items() if p not in right}
    console.print(show(f"{name}, batch {batch_size}, {dtype}: training", found, wrong))
    return [row for row, _ in found]


def main(
    name: Annotated[str, typer.Argument(help="A model of timm.")] = "vit_small_patch16_224",
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Where to keep the rows.")] = None,
) -> None:
    """Time a training step."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console, kept = Console(), []
    for size in batch_size or [8]:
        kept += rows(name, size, dtype, place, rounds, console)
        if json is not None:
            save(kept, json)


if __name__ == "__main__":
    typer.run(main)
