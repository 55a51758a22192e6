"""Cases of ops as they are measured: a table for each as it comes, and how far it is."""

from collections.abc import Callable, Iterable

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import roofline
from .harness import Row, machine
from .op_bench import Case, Outcome, Provider, run_case
from .outputs import Outputs
from .rows import OURS

# On a GPU all cases by some, then by others: a kernel of ours that hangs may cost what comes after it, and
# compiling takes longest.
TURNS = ("others", "ours", "compiled")
Cases = Callable[[torch.device, bool, tuple[str, ...]], Iterable[Case]]
# The providers of a case, and those that are left out on this device, with the reason.
Providers = Callable[[Case, torch.device], tuple[dict[str, Provider], dict[str, str]]]


def run(
    cases: list[tuple[Case, Providers]],
    device: torch.device,
    console: Console,
    outputs: Outputs,
    *,
    rounds: int = 20,
    seconds: float = 0.1,
) -> int:
    """Run the cases, show each and keep its rows as it comes; Ctrl-C loses only the one under way.

    Returns:
        The exit status, as ``Outputs.finish`` has it. A wrong provider is shown and counted.
    """
    here = machine()
    console.print(f"{escape(here.name)}, torch {here.torch}, Triton {here.triton}: {len(cases)} cases")
    said: set[str] = set()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("the machine's own limits", total=len(cases))
        try:
            roofs = roofline.rows(device, tuple(dict.fromkeys(case.dtype for case, _ in cases)))
            outputs.keep(roofs)
            console.print(limits(roofs))
            found: dict[int, Outcome] = {}
            turns = TURNS if device.type == "cuda" else ("all",)
            for turn in turns:
                progress.reset(task)
                for place, (case, providers) in enumerate(cases):
                    progress.update(task, description=escape(case.title))
                    offered, left_out = providers(case, device)
                    for name in left_out.keys() - said:
                        console.print(f"{name}: left out: {escape(left_out[name])}", style="dim")
                    said |= left_out.keys()
                    first = next(iter(offered), None)
                    offered = {n: p for n, p in offered.items() if n == first or turn in ("all", _turn(n))}
                    how = {"rounds": rounds, "seconds": seconds, "outputs": outputs}
                    if wanted := {name: offered[name] for name in outputs.lacking([case.call], offered)}:
                        outcome = run_case(case, wanted, device, here, **how)
                        found[place] = found[place].with_more(outcome) if place in found else outcome
                    if turn == turns[-1] and place in found:
                        console.print(table(found.pop(place)))
                    progress.advance(task)
        except KeyboardInterrupt:
            progress.stop()
            return outputs.finish(console, stopped=True)
    return outputs.finish(console)


def _turn(provider: str) -> str:
    return "ours" if provider.startswith(OURS) else "compiled" if "compiled" in provider else "others"


def limits(roofs: list[Row]) -> str:
    """The machine's own roofline in a line."""
    products = (f"{row.dtype} {row.tflops:.3g} TFLOP/s" for row in roofs if row.op == "matmul")
    return f"roofline: copy {roofs[0].gbps:.0f} GB/s, products {', '.join(products)}"


def table(outcome: Outcome) -> Group:
    """One case: its providers with their times, or why they have none; a GPU's two instead of quantiles."""
    apart = any(row.eager_ms_p50 for row in outcome.rows)
    shown = Table(title=escape(outcome.case.title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    shown.add_column("provider", min_width=14, no_wrap=True)
    times = ("ms", "speed", "timed", "eager", "speed") if apart else ("ms", "p20", "p80", "speed")
    for name in (*times, "TFLOP/s", "GB/s", "roof", "MB", "error", "verdict"):
        shown.add_column(name, justify="right", no_wrap=True)
    notes = []
    for row in outcome.rows:
        if row.provider in outcome.absent:
            continue
        style = None if row.ok else "red"
        verdict = "ok" if row.ok else "WRONG"
        shown.add_row(row.provider, *_numbers(row, apart), verdict, style=style)
        failed = [check for check in outcome.checks[row.provider] if not check.ok]
        notes += [Text(f"  {row.provider}: {check}", style="red") for check in failed]
    notes += [Text(f"  {name}: not run: {reason}", style="dim") for name, reason in outcome.absent.items()]
    return Group(shown, *notes, "")


def _numbers(row: Row, apart: bool) -> list[str]:
    """Without a number, a dash."""
    ms, speed = (row.ms_p50, "{:.4g}"), (row.speed, "{:.2f}x")
    eager = (row.timed, "{}"), (row.eager_ms_p50, "{:.4g}"), (row.eager_speed, "{:.2f}x")
    quantiles = (row.ms_p20, "{:.4g}"), (row.ms_p80, "{:.4g}")
    cells = (
        *((ms, speed, *eager) if apart else (ms, *quantiles, speed)),
        (row.tflops, "{:.3g}"),
        (row.gbps, "{:.0f}"),
        (row.roofline_pct, "{:.0f}%"),
        (row.peak_mb, "{:.1f}"),
        (row.error_ratio, "{:.2f}"),
    )
    return ["-" if value is None else form.format(value) for value, form in cells]
