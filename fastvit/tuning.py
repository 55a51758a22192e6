"""`tune`: measure every kernel at a model's own shapes, here, and keep what `auto` goes by."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import fc1_tiles, measurements
from .accelerate import accelerate
from .accelerate.candidates import blocks_of
from .accelerate.example import Inputs, as_call, example_input
from .accelerate.registry import is_replaced

NOTHING = "there is nothing to tune on a CPU: `auto` goes by the table that fastvit ships"


@dataclass(frozen=True)
class Tuned:
    """A kernel at one call's sizes: whether it is right, torch's time by its own, and what changed.

    ``graphed`` is ``ratio`` in a CUDA graph, None where that is the same.
    """

    op: str
    dtype: str
    direction: str
    sizes: str
    ok: bool
    ratio: float
    before: str
    graphed: float | None = None
    tile: str = ""  # of a product that has a choice of them

    @property
    def now(self) -> str:
        """What `auto` does with it from now on."""
        if not self.ok:
            return "torch: it misses the parity contract"
        if self.tile:
            return self.tile
        eager, graphed = (x >= 1 for x in (self.ratio, self.ratio if self.graphed is None else self.graphed))
        where = "" if eager == graphed else ", in a graph torch" if eager else ", in a graph the kernel"
        return ("the kernel" if eager else "torch") + where


@dataclass(frozen=True)
class Tuning:
    """What `tune` found, and the file that it is kept in; with neither, ``message`` says why."""

    rows: tuple[Tuned, ...]
    file: Path | None = None
    message: str = ""

    def to_json(self) -> str:
        """The rows."""
        rows = [{**row.__dict__, "now": row.now} for row in self.rows]
        return json.dumps({"rows": rows, "file": str(self.file or ""), "message": self.message})

    def __str__(self) -> str:
        if not self.rows:
            return self.message
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __rich__(self):
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        if not self.rows:
            return Text(self.message)
        table = Table(*_HEADINGS, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        table.caption = f"kept in {self.file}"
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)), style=None if row.ok else "red")
        return table


_HEADINGS = ("op", "dtype", "direction", "sizes", "speed", "before", "auto takes now")


def _cells(row: Tuned) -> tuple[str, ...]:
    graphed = "" if row.graphed is None else f", in a graph {row.graphed:.2f}x"
    speed = f"{row.ratio:.2f}x{graphed}" if row.ok else "WRONG"
    return row.op, row.dtype, row.direction, row.sizes, speed, row.before, row.now


def tune(
    model: nn.Module,
    x: Inputs | None = None,
    *,
    cpu: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Tuning:
    """Measure parity and speed of every kernel against torch's op at the shapes of this model's call.

    Gradients are measured too if the model is in training mode. The user's own table is written, which `auto`
    asks before the one that fastvit ships.

    Args:
        model: a model that `accelerate` knows; it is accelerated if it was not. Of frozen weights
            (``mode="inference"``) copies are measured, of others the weights where they lie.
        x: images [B, C, H, W] of the batch size that is to be fast, or a mapping of keyword arguments; by
            default one image of the model's own size.
        cpu: measure the C++ library too, if the model is on a CPU.
        on_start: called with the number of measurements.
        on_step: called with the name of each before it starts.

    Raises:
        ValueError: for a model without a block that fastvit knows, or of unknown image size without ``x``.
    """
    from fastvit_benchmarks.tables import fc1_tiles as tiles
    from fastvit_benchmarks.tables import tune as measuring

    if not blocks_of(model):
        raise ValueError(f"{type(model).__name__} has no block of a vision transformer: nothing to tune")
    device = next(model.parameters()).device
    if device.type != "cuda" and not cpu:
        return Tuning((), message=NOTHING)
    args, kwargs = as_call(example_input(model) if x is None else x)
    if not any(map(is_replaced, model.modules())):
        accelerate(model)
    found = measuring.candidates(model, args, kwargs, model.training)
    products = tiles.asked(found, device)
    if on_start is not None:
        on_start(len(found) + len(products))
    before = [_verdict(candidate) for candidate in found]
    on_step = on_step or (lambda name: None)
    rows = measuring.measure(found, device, on_step)
    if not rows:
        return Tuning((), message="no kernel can run any op of this model here")
    rows += tiles.measure(products, device, on_step) if products else []
    pairs = zip(rows, [*before, *["the model's tile"] * len(products)], strict=True)
    tuned = Tuning(tuple(_tuned(row, old) for row, old in pairs), measurements.keep(rows))
    fc1_tiles.load()
    return tuned


def _verdict(candidate) -> str:
    asked = candidate.question
    direction = (candidate.case.direction,)
    question = (asked.op, asked.gpu, asked.dtype, direction, asked.options, asked.sizes)
    return measurements.refusal(*question) or "the kernel"


def _tuned(row: dict[str, Any], before: str) -> Tuned:
    sizes = ", ".join(f"{name} {bound[0]}" for name, bound in row.items() if isinstance(bound, list))
    facts = (row["op"], row["dtype"], row["direction"], sizes)
    return Tuned(*facts, row["ok"], row["ratio"], before, row.get("graphed"), row.get("tile", ""))
