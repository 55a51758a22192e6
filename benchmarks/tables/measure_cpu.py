"""Which calls the C++ library serves no slower than torch on this CPU: the table that `auto` goes by.

    python -m fastvit_benchmarks.tables.measure_cpu kernels/measured/cpu.json

Each op with and without what may stand beside it, in every dtype and direction, forward also with frozen
weights, at widths and numbers of tokens from a ViT-Ti's at batch 1 to a ViT-L's at batch 8; attention in
float32, forward, at usual widths of a head. What is slower is left out of the table, and rows of other kinds
of CPU stay in it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastvit import native_backend, ops, reference, use_backend

from .. import files, halves
from ..bench_attention import Attention
from ..harness import machine
from ..op_bench import differentiated, run_case
from .measured_table import Point, table

WIDTHS, ROWS = (192, 384, 768, 1024), (197, 1576)
BESIDE = {
    "layer_norm_linear": ("",),
    "linear_residual": ("", "scaled"),
    "layer_norm_mlp": ("", "scaled", "gated", "gated+scaled", "inner_norm", "gated+inner_norm"),
}
# Tokens, and how many heads of all images together: of long sequences a few tell.
HEADS = {50: (3, 12, 96), 197: (3, 12, 96), 577: (3, 12, 48), 1370: (3, 12)}
HEAD_DIMS = (32, 64, 72, 80, 96)
NORM = {"norm_weight": (1,), "norm_bias": (1,)}
RATIO = 1.1  # two copies of a model differ by as much on a machine that is not quiet
# What an accelerated block costs on the host before any of its ops is served: an op must gain more than that.
# Where the MLP does, the block has paid, and the products beside attention need not again.
HOST_MS = 0.2
PAYS, WITH_IT = "layer_norm_mlp", ("layer_norm_linear", "linear_residual")


@dataclass(frozen=True)
class Variant(halves.Half):
    """An op with what stands beside it, on [1, rows, D]."""

    named: str
    beside: str
    passes = {"fwd": 1, "bwd": 1, "step": 1}  # noqa: RUF012

    @property
    def op(self) -> str:
        return self.named

    @property
    def sizes(self) -> dict[str, int]:
        return {"width": self.width, "rows": self.tokens}

    @property
    def streams(self) -> tuple[str, ...]:
        return ("x", "residual") if self.op == "linear_residual" else ("x",)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        scale = {"layer_scale": (1,)} if "scaled" in self.beside else {}
        if self.op == "layer_norm_linear":
            return NORM | {"weight": (3, 1), "bias": (3,)}
        if self.op == "linear_residual":
            return {"weight": (1, 1), "bias": (1,)} | scale
        fc1 = 8 if "gated" in self.beside else 4
        inner = {"inner_norm_weight": (4,), "inner_norm_bias": (4,)} if "inner_norm" in self.beside else {}
        products = {"fc1_weight": (fc1, 1), "fc1_bias": (fc1,), "fc2_weight": (1, 4), "fc2_bias": (1,)}
        return NORM | products | inner | scale

    @property
    def out_width(self) -> int:
        return 3 * self.width if self.op == "layer_norm_linear" else self.width

    def reference(self, **inputs: Tensor) -> Tensor:
        return getattr(reference, self.op)(**inputs, **self.options)

    @property
    def options(self) -> dict[str, str]:
        return {"activation": "swiglu"} if "gated" in self.beside else {}

    def ours(self) -> Callable[..., Tensor]:
        forward = halves.on_backend(self, "cpp")
        frozen = "frozen" in self.beside
        return lambda **inputs: forward(**inputs, **self.options, frozen=frozen)


@dataclass(frozen=True)
class Heads(Attention):
    """Attention of so many heads, with a mask, causal, or plain."""

    beside: str

    @property
    def sizes(self) -> dict[str, int]:
        return {"head_dim": self.head_dim, "tokens": self.tokens, "batch_heads": self.batch * self.heads}

    def on(self, backend: str, qkv: Tensor) -> Tensor:
        mask = torch.arange(self.tokens**2).view(self.tokens, -1) % 7 != 3 if self.beside == "mask" else None
        with use_backend(attention=backend):
            return ops.attention(qkv, self.heads, attn_mask=mask, is_causal=self.beside == "causal")

    def reference(self, qkv: Tensor) -> Tensor:
        return self.on("reference", qkv)

    def ours(self) -> Callable[..., Tensor]:
        return partial(self.on, "cpp")


def cases() -> Iterator[Variant | Heads]:
    for beside, head_dim, tokens in product(("", "mask", "causal"), HEAD_DIMS, HEADS):
        for heads in HEADS[tokens] if not beside or head_dim == 64 else ():
            yield Heads("fwd", "float32", 1, tokens, heads, head_dim, beside)
    dtypes = ("float32", *(["bfloat16"] if native_backend.multiplies_bfloat16() else []))
    for op, dtype in product(BESIDE, dtypes):
        for beside, direction, width, rows in product(BESIDE[op], ("fwd", "bwd"), WIDTHS, ROWS):
            yield Variant(direction, dtype, 1, rows, width, op, beside)
            if direction == "fwd":
                yield Variant(
                    direction, dtype, 1, rows, width, op, "+".join(filter(None, ("frozen", beside)))
                )


class Measured(NamedTuple):
    """Whether the library is right, and times in milliseconds; a wrong one has none."""

    right: bool
    torchs: float
    ours: float

    def ratio(self, host: float = 0.0) -> float:
        return self.torchs / (self.ours + host) if self.right else 0.0


def measured(case: Variant | Heads, rounds: int) -> Measured:
    providers = {"eager": differentiated(case.reference), "cpp": differentiated(case.ours())}
    outcome = run_case(case, providers, torch.device("cpu"), machine(), rounds=rounds, seconds=0.02)
    if reason := outcome.absent.get("cpp"):
        sys.exit(f"{case.title}: {reason}")
    ms = {row.provider: row.ms_p50 for row in outcome.rows}
    return Measured(all(check.ok for check in outcome.checks["cpp"]), ms["eager"], ms.get("cpp") or 0.0)


def points(found: dict[Variant | Heads, Measured]) -> list[Point]:
    """What was measured, as a table is made of it."""
    paid = {
        (c.dtype, c.direction, c.width, c.tokens, c.beside)
        for c, seen in found.items()
        if c.op == PAYS and seen.ratio(HOST_MS) >= RATIO
    }

    def ratio(c: Variant | Heads) -> float:
        free = c.op in WITH_IT and (c.dtype, c.direction, c.width, c.tokens, c.beside) in paid
        return round(found[c].ratio(0.0 if free else HOST_MS), 2)

    return [
        Point(c.op, c.dtype, c.direction, c.beside, c.sizes, seen.right, ratio(c))
        for c, seen in found.items()
    ]


def main(
    file: Annotated[Path, typer.Argument(help="Where the table goes.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 15,
    only: Annotated[list[str] | None, typer.Option("--op", help="This op alone; repeatable.")] = None,
) -> None:
    console, found = Console(), {}
    wanted = [case for case in cases() if not only or case.op in only]
    for case in track(wanted, "measuring", console=Console(stderr=True), transient=True):
        found[case] = measured(case, rounds)
        said = (
            f"{found[case].ratio():5.2f}x {'' if found[case].right else 'WRONG '}{case.title} {case.beside}"
        )
        console.print(said, highlight=False)
    notes = {"gpu": native_backend.machine_name("cpu"), "torch": torch.__version__, "triton": ""}
    notes |= {"date": date.today().isoformat(), "commit": machine().commit}
    rows = table(points(found), notes, least=RATIO)
    others = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in rows if not row["ok"] or row["ratio"] >= RATIO]
    ops_measured = {case.op for case in wanted}
    kept = [row for row in others if row["gpu"] != notes["gpu"] or row["op"] not in ops_measured]
    files.write_rows(file, [*kept, *rows])


if __name__ == "__main__":
    typer.run(main)
