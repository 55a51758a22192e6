"""Whole models: `python -m fastvit_benchmarks.bench_model vit_base_patch16_224 --batch-size 8`.

timm as it comes, compiled (with freezing on a CPU), and accelerated by fastvit, which folds what it may;
interleaved. A provider whose outputs miss the parity contract is shown as wrong, without a time.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import fastvit
from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check
from fastvit.verification import randomize

from .harness import Row, machine, measure, ratios, rotating, save
from .model_screen import show

Provider = Callable[[Tensor], Tensor]
INPUT_SETS = 3


def providers(model: nn.Module, x: Tensor, compiles: bool) -> dict[str, Provider]:
    """timm's own first; ``compiles`` adds the compiler."""
    given: dict[str, Provider] = {"timm eager": model}
    if compiles:
        freezing = torch._inductor.config.patch(freezing=True) if x.device.type == "cpu" else nullcontext()
        with freezing:
            given["timm compiled"] = compiled = torch.compile(copy.deepcopy(model))
            compiled(x)
    given["fastvit"] = fastvit.accelerate(copy.deepcopy(model), mode="inference")
    return given


def check(found: Tensor, model: nn.Module, x: Tensor) -> Check:
    """The output by float64 and by torch's own."""
    truth = copy.deepcopy(model).double()(x.double())
    torchs = []
    for _, context in gemm_libraries(x.device):
        with context():
            torchs.append(model(x))
    return judge("output", found, truth, torchs, kind="model")


@torch.no_grad()
def rows(
    name: str,
    batch_size: int,
    dtype: str,
    device: torch.device,
    rounds: int,
    compiles: bool,
    console: Console,
) -> list[Row]:
    """Every provider on batches of this size."""
    model = randomize(timm.create_model(name)).to(device, getattr(torch, dtype)).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    batches = [torch.randn(batch_size, *size).to(device, getattr(torch, dtype)) for _ in range(INPUT_SETS)]
    here, given = machine(), providers(model, batches[0], compiles)
    judged = {
        provider: check(call(batches[0]), model, batches[0])
        for provider, call in track(given.items(), "judging", console=console, transient=True)
    }
    calls = {p: rotating(call, batches) for p, call in given.items() if judged[p].ok}
    timings = measure(calls, rounds=rounds, warmup=2, device=device)
    speeds = ratios(timings, next(iter(calls)))
    found = []
    for provider, timing in timings.items():
        facts = {"op": name, "provider": provider, "dtype": dtype, "shape": size, "batch": batch_size}
        verdict = judged[provider]
        ratio = verdict.e_rms / verdict.b_rms if verdict.b_rms else None
        found.append((Row.of(timing, here, ok=True, error_ratio=ratio, **facts), speeds[provider]))
    wrong = {provider: str(verdict) for provider, verdict in judged.items() if not verdict.ok}
    console.print(show(f"{name}, batch {batch_size}, {dtype}: inference", found, wrong))
    return [row for row, _ in found]


def main(
    names: Annotated[list[str], typer.Argument(help="Models of timm.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each.")] = 11,
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="Time the compiler too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where to keep the rows.")] = None,
) -> None:
    """Time models at inference."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console, kept = Console(), []
    for name in names:
        for size in batch_size or [1, 8]:
            kept += rows(name, size, dtype, place, rounds, compiles, console)
            if json is not None:
                save(kept, json)


if __name__ == "__main__":
    typer.run(main)
