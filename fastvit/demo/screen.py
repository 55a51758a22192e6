"""The demo's result as one screen of Rich tables."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .result import DemoResult, ParityRow, TimingRow, in_ms


def show(result: DemoResult, console: Console) -> None:
    """Print parity, times and backends, and where the picture is."""
    setting = result.setting
    console.print(
        f"[bold]{setting['title']}[/bold] on {escape(setting['machine'])}, torch {setting['torch']}"
    )
    for table in (parity_table(result), timing_table(result), backend_table(result)):
        console.print(table)
    verdict = "[green]all within the parity contract[/green]" if result.ok else "[red]parity failed[/red]"
    console.print(f"{verdict}; wrote [bold]{escape(result.picture)}[/bold]", highlight=False)


def parity_table(result: DemoResult) -> Table:
    """Errors of every token of every photo."""
    table = _table("parity", "against", "max error", "mean error", "verdict")
    absent = [row for row in result.parity if row.max_error is None]
    for row in result.parity:
        if row in absent:
            table.add_row(row.provider, row.against, "-", "-", "-", style="dim")
            continue
        errors = f"{row.max_error:.1e}", f"{row.mean_error:.1e}"
        verdict = row.note or "ok" if row.ok else f"failed: {row.note}"
        table.add_row(row.provider, row.against, *errors, escape(verdict), style=None if row.ok else "red")
    return _with_reasons(table, absent)


def timing_table(result: DemoResult) -> Table:
    """Milliseconds per image, medians of interleaved rounds."""
    setting = result.setting
    title = f"time, {setting['device']} {setting['dtype']}, batch {setting['batch_size']}"
    table = _table(title, "ms / image", "p20 - p80", "speed")
    absent = [row for row in result.timings if row.ms is None]
    for row in result.timings:
        if row in absent:
            table.add_row(row.provider, "-", "-", "-", style="dim")
            continue
        ratio = f"{row.ratio:.2f}x" if row.ratio else "-"
        table.add_row(row.provider, in_ms(row.ms), f"{in_ms(row.ms_p20)} - {in_ms(row.ms_p80)}", ratio)
    return _with_reasons(table, absent)


def backend_table(result: DemoResult) -> Table:
    """Which backend each op ran on, and why."""
    table = _table("op", "backend", "why")
    for row in result.backends:
        table.add_row(*map(escape, row))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading)
    return table


def _with_reasons(table: Table, absent: list[ParityRow] | list[TimingRow]) -> Table:
    """Below the table, where a sentence has room, why a row has no numbers."""
    if absent:
        table.caption = Text("\n".join(f"{row.provider}: {row.note}" for row in absent), style="dim")
        table.caption_justify = "left"
    return table
