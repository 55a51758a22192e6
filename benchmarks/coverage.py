"""Which of timm's vision transformers are served: `python -m fastvit_benchmarks.coverage docs/coverage.md`.

Each architecture is accelerated and asked three things: what `explain` says for an H100, whether a run
without data calls the kernels that it says, and, a few blocks deep with random weights, how far its outputs
in float32 are from the original's in float64.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.progress import track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.accelerate.candidates import blocks_of
from fastvit.accelerate.example import example_input
from fastvit.backends import kernels_for
from fastvit.fake_run import run_without_data
from fastvit.gpus import assume_arch
from fastvit.verification import randomize

ARCH = "sm_90"
# timm's modules whose models are of its plain VisionTransformer class, and of its Eva class.
FAMILIES = {
    "VisionTransformer": ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin"),
    "Eva": ("eva",),
}


@dataclass(frozen=True)
class Line:
    """An architecture: the share of its blocks that are served, whether its embedding is, and what is not.

    ``error`` is the largest of the outputs' errors in float32; ``within``: all are within the contract.
    """

    name: str
    blocks: float
    embedding: bool
    error: float
    within: bool
    reasons: tuple[str, ...]


def architectures(family: str) -> list[str]:
    """timm's names of a family's architectures."""
    return [name for module in FAMILIES[family] for name in timm.list_models(module=module)]


def whole(name: str) -> nn.Module:
    """The architecture at its full depth and without data, accelerated."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it changes nothing is a line of the table
        return fastvit.accelerate(model)


def short(name: str, depth: int) -> nn.Module:
    """The architecture with this many blocks and random weights that matter, accelerated."""
    options = {}
    if "sapiens2" in name:  # it names the heads of every block: some full, some grouped
        with torch.device("meta"):
            heads = [block.attn.num_kv_heads for block in timm.create_model(name).blocks]
        options["num_kv_heads"] = tuple(heads[i * (len(heads) - 1) // 2] for i in range(depth))
    model = randomize(timm.create_model(name, depth=depth, **options)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastvit.accelerate(model)


def line(name: str, depth: int = 1) -> Line:
    """Ask one architecture.

    Raises:
        AssertionError: if `explain` and a run disagree.
    """
    model = whole(name)
    explanation = fastvit.explain(model, arch=ARCH)
    said = {(row.module, row.op) for row in explanation.rows if row.accelerated}
    called = calls(model)
    if said != called:
        raise AssertionError(
            f"{name}: explain alone says {said - called}, and a run alone calls {called - said}"
        )
    model = short(name, depth)
    report = fastvit.verify(model, example_input(model, generator=torch.Generator().manual_seed(0)))
    return Line(
        name,
        explanation.coverage.blocks,
        ("patch_embed", "patch_embed") in said,
        next(row.e_max for row in report.rows if row.name == "output"),
        report.ok,
        tuple(dict.fromkeys(row.reason for row in explanation.rows if not row.accelerated)),
    )


def calls(model: nn.Module) -> set[tuple[str, str]]:
    """Which module calls which registered op, when it may have kernels only: a run on fake CUDA tensors."""
    found: set[tuple[str, str]] = set()
    inside = ["patch_embed"]  # what is in no block

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastvit":
                found.add((inside[-1], func._opname.removesuffix("_fwd")))
            return func(*args, **kwargs or {})

    with _entering(model, inside), assume_arch(ARCH), fastvit.use_backend(**kernels_for("cuda")), Record():
        run_without_data(model, (example_input(model),), {}, "cuda", gradients=False)
    return found


@contextmanager
def _entering(model: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep the name of the block that is running at the end of the list."""
    handles = []
    for name, block in blocks_of(model).items():
        handles.append(block.register_forward_pre_hook(lambda _m, _a, name=name: inside.append(name)))
        handles.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def table(lines: dict[str, list[Line]], depth: int) -> str:
    """The Markdown of docs/coverage.md."""
    parts = [
        "# Which of timm's vision transformers are served",
        "",
        "Written by `make coverage`. *Blocks*: the share of them whose every op has a Triton or CUDA kernel",
        f'on an H100, as `fastvit.explain(model, arch="{ARCH}")` says and a run on fake CUDA tensors',
        "confirms. *Error*: the largest of the outputs' errors in float32 on a CPU, against the original in",
        f"float64, {depth} block{'s' * (depth > 1)} deep with random weights; embedding, blocks and output",
        "are all judged by the parity contract.",
        "",
        f"timm {timm.__version__}, torch {torch.__version__}.",
    ]
    for family, rows in lines.items():
        served = sum(row.blocks == 1.0 for row in rows)
        parts += ["", f"## {family}: every block served in {served} of {len(rows)} architectures", ""]
        parts += ["| architecture | blocks | embedding | error | left alone |", "|---|---|---|---|---|"]
        for row in rows:
            error = f"{row.error:.1e}" if row.within else f"{row.error:.1e}, NOT within the contract"
            cells = (row.name, f"{row.blocks:.0%}", "fused" if row.embedding else "its own", error)
            parts.append(f"| {' | '.join(cells)} | {'; '.join(row.reasons)} |")
    return "\n".join(parts) + "\n"


def main(
    output: Annotated[Path, typer.Argument(help="The Markdown file to write.")],
    depth: Annotated[int, typer.Option(min=1, help="Blocks of each model that is run.")] = 1,
) -> None:
    """Ask every architecture, and write the table."""
    lines: dict[str, list[Line]] = {}
    for family in FAMILIES:
        names = architectures(family)
        lines[family] = [line(name, depth) for name in track(names, f"{family} ({len(names)})")]
    output.parent.mkdir(exist_ok=True)
    output.write_text(table(lines, depth), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
