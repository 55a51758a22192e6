"""A model's providers as a table: times, ratios to the first, memory; why others have none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .harness import Row

COLUMNS = ("ms", "p20", "p80", "speed", "images/s", "roof", "MB", "error")


@dataclass
class Shown:
    """A model's rows, each provider's speed as a multiple of the first one's, and why others have no row."""

    title: str
    rows: list[Row]
    speeds: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    def __rich__(self) -> Group:
        table = Table(title=escape(self.title), title_justify="left", box=None, padding=(0, 1, 0, 0))
        rows = [row for row in self.rows if row.verdict != "not run"]
        cells = [self._cells(row) for row in rows]
        measured = [any(values) for values in zip(*cells, strict=True)] or [True] * len(COLUMNS)
        table.add_column("provider", no_wrap=True)
        for name in (*compress(COLUMNS, measured), "verdict"):
            table.add_column(name, justify="right", no_wrap=True)
        for row, values in zip(rows, cells, strict=True):
            numbers = (value or "-" for value in compress(values, measured))
            verdict, style = ("ok", None) if row.ok else ("WRONG", "red")
            table.add_row(row.provider, *numbers, verdict, style=style)
        notes = [Text(f"  {row.provider}: {row.reason}", style="red") for row in rows if not row.ok]
        absent = {row.provider: row.reason for row in self.rows if row.verdict == "not run"} | self.left_out
        notes += [Text(f"  {name}: not run: {why}", style="dim") for name, why in absent.items()]
        return Group(table, *notes, "")

    def _cells(self, row: Row) -> list[str]:
        """Empty without a number."""
        rate = None if row.ms_p50 is None else 1e3 * row.batch / row.ms_p50
        numbers = (
            (row.ms_p50, "{:.4g}"),
            (row.ms_p20, "{:.4g}"),
            (row.ms_p80, "{:.4g}"),
            (self.speeds.get(row.provider), "{:.2f}x"),
            (rate, "{:.1f}"),
            (row.roofline_pct, "{:.0f}%"),
            (row.peak_mb, "{:.0f}"),
            (row.error_ratio, "{:.2f}"),
        )
        return ["" if value is None else form.format(value) for value, form in numbers]


@contextmanager
def progress(description: str, total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A bar that leaves nothing behind; call what it gives with the name of each step that starts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task, started = bar.add_task(description, total=total), []

        def step(name: str = "") -> None:
            bar.update(task, description=escape(f"{description} {name}".strip()), advance=len(started))
            started[:] = [1]

        yield step
