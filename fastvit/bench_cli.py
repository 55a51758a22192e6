"""`fastvit bench`: the benchmarks' command line. What it runs is in fastvit_benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Time ops and models beside torch and other engines, each judged first.", no_args_is_help=True
)

Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: a GPU if there is one.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds, in each of which every provider runs once.")]
Names = Annotated[list[str], typer.Argument(help="Models of timm.")]
Batches = Annotated[
    list[str] | None, typer.Option("--batch-size", help="Images at a time: a number, or several.")
]
Dtypes = Annotated[list[str] | None, typer.Option(help="float32, tf32, bfloat16, float16; repeatable.")]
Tuned = Annotated[bool, typer.Option("--max-autotune", help="Time that mode of torch.compile too (minutes).")]
Json = Annotated[Path | None, typer.Option(help="Keep the rows here, as they come.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with --json FILE where a run ended, without what it died of.")
]
Only = Annotated[
    list[str] | None, typer.Option("--provider", help="This provider alone, by its whole name; repeatable.")
]
Csv = Annotated[Path | None, typer.Option(help="Keep a table here; of models, with timm's column names.")]
Png = Annotated[Path | None, typer.Option(help="Draw bars and the roofline here.")]
Baseline = Annotated[Path | None, typer.Option(help="Compare with the rows that --json kept of another run.")]
Slower = Annotated[
    str | None, typer.Option(help="End with status 1 if one of ours is slower than the baseline by this: 5%.")
]


@app.command()
def ops(
    names: Annotated[
        list[str] | None, typer.Argument(help="Of the five ops; all of them by default.")
    ] = None,
    dtype: Dtypes = None,
    filter: Annotated[str, typer.Option(help="Words that a case's title must all have.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A handful of cases of each op.")] = False,
    device: Device = None,
    rounds: Rounds = 20,
    provider: Only = None,
    json: Json = None,
    resume: Resume = False,
    csv: Csv = None,
    png: Png = None,
    baseline: Baseline = None,
    fail_if_slower: Slower = None,
) -> None:
    """Time the kernels beside torch's own ops, torch.compile and other libraries.

    On a GPU a call is timed twice, with a cold L2: its kernels alone, in a CUDA graph that is replayed (what
    cannot be captured is queued while the GPU sleeps, and the row says so: graph, queued or wall), and in
    eager, as what it adds to a chain of calls that Python makes. On a CPU a clock stands around the call.
    """
    from fastvit_benchmarks.commands import bench_ops_command, outputs

    from .commands import pick_device

    kept = outputs(baseline, fail_if_slower, resume, json=json, csv=csv, png=png)
    how = (names or [], dtype or [], filter, quick, rounds, kept, provider or [])
    raise typer.Exit(bench_ops_command(_console(), pick_device(device), *how))


@app.command()
def model(
    names: Names,
    batch_size: Batches = None,
    dtype: Dtypes = None,
    device: Device = None,
    rounds: Rounds = 11,
    max_autotune: Tuned = False,
    provider: Only = None,
    json: Json = None,
    resume: Resume = False,
    csv: Csv = None,
    png: Png = None,
    baseline: Baseline = None,
    fail_if_slower: Slower = None,
) -> None:
    """Time whole models at inference: timm eager, torch.compile, and fastvit by backend."""
    kept = (baseline, fail_if_slower, resume, json, csv, png)
    which = {"only": provider or [], "max_autotune": max_autotune}
    _models(names, batch_size, dtype, device, rounds, *kept, **which)


@app.command()
def compare(
    names: Names,
    batch_size: Batches = None,
    dtype: Dtypes = None,
    device: Device = None,
    rounds: Rounds = 11,
    max_autotune: Tuned = False,
    provider: Only = None,
    json: Json = None,
    resume: Resume = False,
    csv: Csv = None,
    png: Png = None,
    baseline: Baseline = None,
    fail_if_slower: Slower = None,
) -> None:
    """The same beside every other engine that is installed: ONNX Runtime, OpenVINO, TensorRT."""
    kept = (baseline, fail_if_slower, resume, json, csv, png)
    which = {"only": provider or [], "max_autotune": max_autotune}
    _models(names, batch_size, dtype, device, rounds, *kept, **which, engines=True)


@app.command()
def train(
    names: Names,
    batch_size: Batches = None,
    dtype: Dtypes = None,
    device: Device = None,
    rounds: Rounds = 7,
    max_autotune: Tuned = False,
    provider: Only = None,
    json: Json = None,
    resume: Resume = False,
    csv: Csv = None,
    png: Png = None,
    baseline: Baseline = None,
    fail_if_slower: Slower = None,
) -> None:
    """Time a training step: forward, backward, and the whole with AdamW."""
    kept = (baseline, fail_if_slower, resume, json, csv, png)
    which = {"only": provider or [], "max_autotune": max_autotune}
    _models(names, batch_size, dtype, device, rounds, *kept, **which, training=True)


@app.command()
def host(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the fastest counts.")] = 300,
) -> None:
    """Time the Python of a block beside that of timm's: nothing is computed, no GPU takes part."""
    from fastvit_benchmarks.bench_host import bench_host_command

    raise typer.Exit(bench_host_command(_console(), rounds))


def _models(names, batch_size, dtype, device, rounds, baseline, slower, resume, json, csv, png, **which):
    from fastvit_benchmarks.commands import bench_models_command, outputs

    from .commands import pick_device

    names, sizes = _parted(names, batch_size or [])
    kept = outputs(baseline, slower, resume, json=json, csv=csv, png=png)
    place = pick_device(device)
    sizes, dtypes = sizes or [1, 8], dtype or ["float32" if place.type == "cpu" else "bfloat16"]
    raise typer.Exit(bench_models_command(_console(), place, names, sizes, dtypes, rounds, kept, **which))


def _parted(names: list[str], sizes: list[str]) -> tuple[list[str], list[int]]:
    """Models and numbers, as `--batch-size 1 8` leaves its second number among the names."""
    numbers = [*sizes, *(name for name in names if name.isdecimal())]
    if wrong := [number for number in numbers if not number.isdecimal() or int(number) < 1]:
        raise typer.BadParameter(f"{wrong[0]!r} is no batch size")
    models = [name for name in names if not name.isdecimal()]
    if not models:
        raise typer.BadParameter("name a model of timm")
    return models, list(dict.fromkeys(map(int, numbers)))


def _console():
    from rich.console import Console

    return Console()
