"""The command line: thin commands over the library. A failure is one clear line and a non-zero exit."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import bench_cli
from .errors import FastvitError

app = typer.Typer(
    help="A drop-in faster Vision Transformer for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_cli.app, name="bench")


class Dtype(StrEnum):
    """The dtypes in which a model can be verified."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


MODEL = typer.Argument(help="A variant of ours, a timm model, or a folder of a Hugging Face model.")
Checkpoint = Annotated[Path | None, typer.Option(help="Weights; random ones if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1. Default: a GPU if there is one.")
]


@app.command()
def info(json: Json = False) -> None:
    """Show versions, the GPU, what is built, and which backend each op uses here and why."""
    from .inspection import Inspection

    inspection = Inspection.here()
    if json:
        typer.echo(inspection.to_json())
    else:
        _console().print(inspection)


@app.command()
def verify(
    model: Annotated[str | None, MODEL] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Judge the five ops in every data regime.")] = False,
    checkpoint: Checkpoint = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the batch.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="The model's dtype.")] = Dtype.float32,
    backward: Annotated[bool, typer.Option(help="Judge the parameters' gradients too.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Check parity by the contract: of a model (against timm where it is installed), or of the ops."""
    from .commands import verify_model_command, verify_ops_command

    if ops == (model is not None):
        raise typer.BadParameter("name a model, or pass --ops")
    console = _console(stderr=json)
    if ops:
        report = verify_ops_command(console, device)
    else:
        report = verify_model_command(console, model, checkpoint, batch_size, dtype.value, backward, device)
    if json:
        typer.echo(report.to_json())
    else:
        console.print(report)
    report.raise_if_failed()
    console.print(f"{len(report.rows)} checks, all within the contract")


@app.command()
def explain(
    model: Annotated[str, MODEL],
    arch: Annotated[str | None, typer.Option(help="Answer for this GPU architecture, as in sm_90.")] = None,
    checkpoint: Checkpoint = None,
    flops: Annotated[bool, typer.Option(help="Count FLOPs too.")] = True,
    json: Json = False,
) -> None:
    """Show which backend serves each op of a model, and why, here or for a GPU that is not here."""
    from .commands import explain_command

    explanation = explain_command(model, checkpoint, arch, flops)
    if json:
        typer.echo(explanation.to_json())
    else:
        _console().print(explanation)


@app.command()
def tune(
    model: Annotated[str, MODEL],
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the batch that is to be fast.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="The model's dtype.")] = Dtype.float32,
    backward: Annotated[bool, typer.Option(help="Measure gradients too.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="On a CPU, measure the C++ library.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure every kernel at a model's shapes on this GPU, and keep what `auto` goes by from then on."""
    from .commands import tune_command

    console = _console(stderr=json)
    tuning = tune_command(console, model, batch_size, dtype.value, backward, cpu, device)
    if json:
        typer.echo(tuning.to_json())
    else:
        console.print(tuning)


@app.command()
def demo(
    photos: Annotated[
        Path | None, typer.Option(help="A folder of images instead of the photos that ship.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
) -> None:
    """Run DINOv2 ViT-S/14 on photos: parity, time per image, and a picture."""
    from .demo.run import run

    result = run(photos, output, console=_console())
    if not result.ok:
        raise typer.Exit(1)


def _console(stderr: bool = False):
    from rich.console import Console

    return Console(stderr=stderr)


def main() -> None:
    """Entry point: errors that fastvit raises on purpose are one line on stderr, without a traceback."""
    try:
        app()
    except (FastvitError, ValueError, OSError, ImportError) as error:
        sys.exit(f"fastvit: error: {error}")
    except KeyboardInterrupt:
        sys.exit("fastvit: interrupted")


if __name__ == "__main__":
    main()
