"""A model's providers as a table: times, ratios to the first, memory; the wrong ones without a time."""

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .harness import Row

COLUMNS = ("provider", "direction", "ms", "p20", "p80", "speed", "images/s", "MB", "verdict")


def show(title: str, rows: Iterable[tuple[Row, float]], wrong: dict[str, str]) -> Group:
    """Rows with their speed as a multiple of the first provider's; ``wrong``: why a provider has no time."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right", no_wrap=True)
    for row, speed in rows:
        memory = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        times = (f"{value:.4g}" for value in (row.ms_p50, row.ms_p20, row.ms_p80))
        rate = f"{1e3 * row.batch / row.ms_p50:.1f}"
        table.add_row(row.provider, row.direction, *times, f"{speed:.2f}x", rate, memory, "ok")
    for provider in wrong:
        table.add_row(provider, *["-"] * (len(COLUMNS) - 2), "WRONG", style="red")
    notes = [Text(f"  {provider}: {reason}", style="red") for provider, reason in wrong.items()]
    return Group(table, *notes, "")
