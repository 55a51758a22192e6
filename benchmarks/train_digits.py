"""Proof that it learns the same: `python -m fastvit_benchmarks.train_digits [FOLDER]`.

A small ViT is trained from scratch on the digits that scikit-learn ships: by torch's own ops twice, on one
thread and on two, which shows how far rounding alone carries two runs apart, and by fastvit's kernels. A run
that was stopped, or killed, goes on from the state in the folder to the same curve.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import fastvit
from fastvit.backends import kernels_for
from fastvit.errors import FastvitError

from . import digits
from .curves import draw
from .trainer import Trainer

STEPS, NEAR, MEAN_OF = 600, 60, 200
NEAR_TOLERANCE, ACCURACY = 0.01, 0.97
# A loss near one, in float32: what its mean can differ by if nothing else does.
ROUNDING = 1e-7
TORCH, OTHER, OURS = "torch", "torch, one thread", "fastvit"


@dataclass(frozen=True)
class Curve:
    """The losses of a run, and the share of test images that its model tells right."""

    losses: list[float]
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """A rule in words, what was found, and whether it holds."""

    rule: str
    found: str
    holds: bool


def train(
    name: str,
    folder: Path,
    steps: int,
    device: str = "cpu",
    threads: int = 2,
    on_step: Callable[[], object] = lambda: None,
) -> Curve:
    """One of the three runs, from where it stopped if it did."""
    data = digits.Digits(*(tensor.to(device) for tensor in digits.load()))
    model = digits.build().to(device)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if name == OTHER else threads)
    try:
        with _kernels(model, device) if name == OURS else nullcontext():
            trainer = Trainer(
                model,
                *data[:2],
                folder / f"{name.replace(', ', '-').replace(' ', '-')}.pt",
                steps,
                batch_size=64,
                augment=digits.noisy,
                described={"ops": name},
            )
            for _ in trainer.losses:
                on_step()
            return Curve(trainer.run(on_step=on_step), digits.accuracy(model, data))
    finally:
        torch.set_num_threads(before)


def _kernels(model: nn.Module, device: str) -> AbstractContextManager:
    fastvit.accelerate(model, strict=True)
    return fastvit.use_backend(**kernels_for(device))


def judge(curves: dict[str, Curve]) -> list[Verdict]:
    """fastvit's curve against torch's own."""
    ours, theirs, other = (curves[name] for name in (OURS, TORCH, OTHER))
    pairs = list(zip(ours.losses, theirs.losses, strict=True))
    near = max(abs(a - b) / b for a, b in pairs[:NEAR])
    means = {name: fmean(curve.losses[:MEAN_OF]) for name, curve in curves.items()}
    away, spread = abs(means[OURS] - means[TORCH]), abs(means[OTHER] - means[TORCH])
    return [
        Verdict(
            f"every loss of the first {NEAR} steps within {NEAR_TOLERANCE:.0%} of torch's",
            f"{near:.1e}",
            near <= NEAR_TOLERANCE,
        ),
        Verdict(
            f"the mean of {MEAN_OF} losses within twice torch's own spread",
            f"{away:.1e} of {2 * spread:.1e}",
            away <= max(2 * spread, ROUNDING),
        ),
        Verdict(
            f"test accuracy at least {ACCURACY:.0%}",
            f"{ours.accuracy:.1%} (torch {theirs.accuracy:.1%}, {other.accuracy:.1%})",
            ours.accuracy >= ACCURACY,
        ),
    ]


def main(
    folder: Annotated[Path, typer.Argument(help="Where states and the picture are kept.")] = Path("digits"),
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = STEPS,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of two of the three runs.")] = 2,
) -> None:
    """Train the three, judge fastvit's curve by torch's, and draw them."""
    console = Console()
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    curves: dict[str, Curve] = {}
    try:
        with Progress(*columns, console=console) as progress:
            for name in (TORCH, OTHER, OURS):
                task = progress.add_task(name, total=steps)
                curves[name] = train(name, folder, steps, device, threads, partial(progress.advance, task))
    except FastvitError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    table = Table("rule", "found", "holds")
    verdicts = judge(curves)
    for verdict in verdicts:
        table.add_row(verdict.rule, verdict.found, "yes" if verdict.holds else "NO")
    console.print(table)
    picture = folder / "digits.png"
    draw({name: curve.losses for name, curve in curves.items()}, picture, "Digits: loss by step")
    console.print(f"{picture}")
    if not all(verdict.holds for verdict in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
