"""A benchmark's command line, and what it shows: a table for each case as it comes, and how far it is."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .harness import Row, machine, save
from .op_bench import Case, Outcome, Provider, run_case
from .roofline import DTYPES, peak_gbps

Cases = Callable[[torch.device, bool, tuple[str, ...]], Iterable[Case]]
# The providers of a case, and those that are left out on this device, with the reason.
Providers = Callable[[Case, torch.device], tuple[dict[str, Provider], dict[str, str]]]

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


def command(cases: Cases, providers: Providers) -> None:
    """Run as a program."""

    def bench(
        device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
        dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}; repeatable.")] = None,
        filter: Annotated[str, typer.Option(help="Words that a case's title must all hold.")] = "",
        quick: Annotated[bool, typer.Option("--quick", help="A handful of cases.")] = False,
        rounds: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 20,
        json: Annotated[Path | None, typer.Option(help="Where to keep the rows.")] = None,
    ) -> None:
        if unknown := set(dtype or ()) - DTYPES.keys():
            raise typer.BadParameter(f"unknown dtype {min(unknown)}; the dtypes are {', '.join(DTYPES)}")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = tuple(dtype or (DTYPES if place.type == "cuda" else ("float32", "bfloat16")))
        wanted = [
            case
            for case in cases(place, quick, chosen)
            if all(word in case.title.split() for word in filter.split())
        ]
        raise typer.Exit(run(wanted, providers, place, Console(), rounds=rounds, path=json))

    typer.run(bench)


def run(
    cases: list[Case],
    providers: Providers,
    device: torch.device,
    console: Console,
    *,
    rounds: int = 20,
    seconds: float = 0.1,
    path: Path | None = None,
) -> int:
    """Run the cases, show each and keep its rows as it comes; Ctrl-C loses only the one under way.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. A wrong provider is shown and counted.
    """
    here, rows = machine(), []
    console.print(f"{escape(here.name)}, torch {here.torch}, Triton {here.triton}: {len(cases)} cases")
    said, status = set(), 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        try:
            console.print(f"copy {peak_gbps(device):.0f} GB/s, the roofline of bytes")
            for case in cases:
                progress.update(task, description=escape(case.title))
                offered, left_out = providers(case, device)
                for name in left_out.keys() - said:
                    console.print(f"{name}: left out: {escape(left_out[name])}", style="dim")
                said |= left_out.keys()
                outcome = run_case(case, offered, device, here, rounds=rounds, seconds=seconds)
                rows += outcome.rows
                if path is not None:
                    save(rows, path)
                console.print(table(outcome))
                progress.advance(task)
        except KeyboardInterrupt:
            status = INTERRUPTED
    console.print(_summary(rows, path, stopped=bool(status)))
    return status


def table(outcome: Outcome) -> Group:
    """One case: its providers with their times, or why they have none."""
    shown = Table(title=escape(outcome.case.title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    shown.add_column("provider", min_width=14, no_wrap=True)
    for name in ("ms", "p20", "p80", "speed", "TFLOP/s", "GB/s", "roof", "MB", "error", "verdict"):
        shown.add_column(name, justify="right", no_wrap=True)
    notes = []
    for row in outcome.rows:
        style = None if row.ok else "red"
        verdict = "ok" if row.ok else "WRONG"
        shown.add_row(row.provider, *_numbers(row, outcome.speedups.get(row.provider)), verdict, style=style)
        failed = [check for check in outcome.checks[row.provider] if not check.ok]
        notes += [Text(f"  {row.provider}: {check}", style="red") for check in failed]
    notes += [Text(f"  {name}: not run: {reason}", style="dim") for name, reason in outcome.absent.items()]
    return Group(shown, *notes, "")


def _numbers(row: Row, speedup: float | None) -> list[str]:
    """Without a number, a dash."""
    cells = (
        (row.ms_p50, "{:.4g}"),
        (row.ms_p20, "{:.4g}"),
        (row.ms_p80, "{:.4g}"),
        (speedup, "{:.2f}x"),
        (row.tflops, "{:.3g}"),
        (row.gbps, "{:.0f}"),
        (row.roofline_pct, "{:.0f}%"),
        (row.peak_mb, "{:.1f}"),
        (row.error_ratio, "{:.2f}"),
    )
    return ["-" if value is None else form.format(value) for value, form in cells]


def _summary(rows: list[Row], path: Path | None, *, stopped: bool) -> str:
    wrong = sum(not row.ok for row in rows)
    text = f"{len(rows)} rows, {wrong} wrong" + (f"; kept in {path}" if path is not None and rows else "")
    text = f"stopped: {text}" if stopped else text
    return f"[red]{escape(text)}[/red]" if wrong else escape(text)
