"""What `make gpu` ends with: a line a stage, and how fast ours is beside torch's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from . import findings
from .ledger import Record
from .stage_runner import Stage

STYLES = {"ok": "green", "absent": "dim", "not reached": "yellow", "timed out": "yellow"}


def summary(wanted: Sequence[Stage], reached: Mapping[str, Record]) -> Table:
    """A line for each stage, what did not fit into the time included."""
    table = Table("stage", "status", "time", "found", box=SIMPLE, pad_edge=False)
    table.columns[2].justify = "right"
    for stage in wanted:
        record = reached.get(stage.name)
        status = record.status if record else "not reached"
        said = [] if record is None else [part for part in (record.found, record.reason) if part]
        seconds = f"{record.seconds:.0f} s" if record else "-"
        table.add_row(stage.name, Text(status, STYLES.get(status, "red")), seconds, Text(": ".join(said)))
    return table


def figures(folder: Path) -> RenderableType:
    """Our fastest provider of each call beside torch eager and torch.compile, from all files of rows."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("", "direction", "dtype", "batch", "ours", "ms", "over eager", "over compile"):
        table.add_column(name, justify="right" if name in ("batch", "ms") or "over" in name else "left")
    for path in sorted(folder.glob("*.json")):
        for figure in findings.figures(findings.measured(path)):
            ms = "-" if figure.ms is None else f"{figure.ms:.4g}"
            over = ["-" if x is None else f"{x:.2f}x" for x in (figure.over_eager, figure.over_compiled)]
            name = figure.what if path.stem.startswith("ops") else f"{figure.what} ({path.stem})"
            cells = (name, figure.direction, figure.dtype, figure.batch, figure.provider, ms, *over)
            table.add_row(*map(Text, cells))
    return table if table.row_count else ""
