"""The verify command's work: build what is to be judged, show progress, hand back the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from .accelerate import accelerate
from .accelerate.candidates import blocks_of
from .accelerate.example import example_input
from .contract import Report
from .explanation import Explanation, explain
from .gemm_libraries import gemm_libraries
from .model_names import load_model
from .tuning import Tuning, tune
from .verification import op_cases, randomize, verify, verify_op


def verify_ops_command(console: Console, device: str | None) -> Report:
    """Every op in every regime and dtype on one device."""
    place = pick_device(device)
    cases = op_cases()
    report = Report()
    with _progress(console, len(cases)) as step:
        for case in cases:
            step(str(case))
            report.rows.append(verify_op(case, place))
    return report


def verify_model_command(
    console: Console,
    name: str,
    checkpoint: Path | None,
    batch_size: int,
    dtype: str,
    backward: bool,
    device: str | None,
) -> Report:
    """A variant of ours by timm's implementation of it; another library's model, accelerated, by its own."""
    place = pick_device(device)
    named = load_model(name, checkpoint)
    model = named.model
    if named.is_random:
        randomize(model)
        console.print(f"{name} with random weights (pass --checkpoint for real ones)")
    model = model.to(place, getattr(torch, dtype)).eval()
    oracle = None
    if named.library != "fastvit":
        _accelerate(name, model)
        console.print(f"judged by {named.library}'s own model in float64")
    elif (oracle := _timm_twin(name, model)) is not None:
        console.print("judged by timm's implementation in float64")
    else:
        console.print("timm is not installed: judged by the model's own float64 copy on torch's ops")
    images = example_input(model, batch_size, torch.Generator().manual_seed(0))
    with _progress(console, 2 + len(gemm_libraries(place))) as step:
        return verify(model, images, backward=backward, oracle=oracle, on_step=step)


def explain_command(name: str, checkpoint: Path | None, arch: str | None, flops: bool) -> Explanation:
    """The model, accelerated, explained on this machine or for another architecture."""
    model = load_model(name, checkpoint).model.eval()
    _accelerate(name, model)
    return explain(model, example_input(model) if flops else None, arch)


def tune_command(
    console: Console, name: str, batch_size: int, dtype: str, backward: bool, cpu: bool, device: str | None
) -> Tuning:
    """The model's kernels, measured on one device."""
    place = pick_device(device)
    model = load_model(name).model.to(place, getattr(torch, dtype)).train(backward)
    _accelerate(name, model)
    with _progress(console, 1) as step:
        return tune(model, example_input(model, batch_size), cpu=cpu, on_start=step.of, on_step=step)


def _accelerate(name: str, model: nn.Module) -> None:
    if not blocks_of(model):
        raise ValueError(f"{name} has no block of a vision transformer: there is nothing to accelerate")
    accelerate(model)


def pick_device(device: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one, else the CPU.

    Raises:
        ValueError: if torch does not know it, or cannot use it here.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; try cpu or cuda") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no CUDA GPU here")
    try:
        torch.ones(1, device=place).item()
    except Exception as error:  # each device's runtime fails with types of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason:.120}") from None
    return place


def _timm_twin(name: str, model: nn.Module) -> nn.Module | None:
    """timm's model of the same name with the same weights, or None without timm."""
    try:
        import timm
    except ImportError:
        return None
    size = model.patch_embed.img_size
    twin = timm.create_model(name, num_classes=model.num_classes, img_size=size).eval()
    parameter = next(model.parameters())
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.to(parameter.device, parameter.dtype)


class _Step:
    """Called with the name of what starts; ``of`` says of how many."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.started = progress, False
        self.task = progress.add_task("", total=total)

    def of(self, total: int) -> None:
        self.progress.update(self.task, total=total)

    def __call__(self, description: str) -> None:
        self.progress.update(self.task, description=description, advance=int(self.started))
        self.started = True


@contextmanager
def _progress(console: Console, total: int) -> Iterator[_Step]:
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Step(progress, total)
