"""`make gpu`: everything that only a GPU shows, in stages, within a time limit, going on where it ended.

    make gpu                                         # in the environment that make keeps
    make gpu STAGES="parity ops"                     # these alone, even if they are done
    make gpu FRESH=1 LIMIT=3600                      # all anew, within an hour
    python -m fastvit_benchmarks.gpu parity ops      # with another Python, from a checkout that it imports

Another Python, with its own torch and Triton, needs `pip install -e . --no-build-isolation --no-deps`, and
typer, rich, numpy, safetensors, pytest, pybind11 and ninja beside these; a network is not needed.

Results go to benchmarks/results/<gpu>/: a file of rows a benchmark, and stages.json, which says what
became of each stage. A stage that is done is not run again by the same commit, sources and versions. The
exit status is 1 if a gate (build, parity, determinism, sanitizers) is anything but passed or a benchmark
failed, and 130 after Ctrl-C.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from . import preflight, stage_runner, stages
from .ledger import Ledger, Record
from .preflight import Facts, Missing
from .stage_runner import Result, Stage
from .summary import figures, summary

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended
RESULTS = Path(__file__).parent.parent / "results"


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Stages to run even if they are done.")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for all of them.")] = 1200,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew.")] = False,
    commit: Annotated[str, typer.Option(help="Of sources without a git history.")] = "",
) -> None:
    """Test, tune and measure on this machine's GPU."""
    console = Console(highlight=False, soft_wrap=True)
    if unknown := set(only or ()) - {stage.name for stage in stages.STAGES}:
        names = ", ".join(stage.name for stage in stages.STAGES)
        raise typer.BadParameter(f"unknown stage {min(unknown)}; the stages are {names}")
    try:
        facts = preflight.look(commit, fresh)
    except Missing as reason:
        sys.exit(f"gpu: {reason}")
    console.print(f"{escape(facts.gpu)}, {', '.join(f'{k} {v}' for k, v in facts.state.versions.items())}")
    for note in facts.notes():
        console.print(f"[yellow]{escape(note)}")
    signal.signal(signal.SIGTERM, _interrupt)
    raise typer.Exit(run(facts, stages.STAGES, RESULTS / facts.slug, console, only=only or (), limit=limit))


def run(
    facts: Facts,
    table: Sequence[Stage],
    folder: Path,
    console: Console,
    *,
    only: Sequence[str] = (),
    limit: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the stages that are not done, or those that are named, and show what became of all of them.

    Returns:
        The exit status.
    """
    ledger = Ledger.load(folder / "stages.json")
    if ledger.problem:
        console.print(f"[yellow]{escape(ledger.problem)}")
    if facts.fresh and not only:
        ledger.records.clear()
    end, started, status = clock() + limit, False, 0
    wanted = [stage for stage in table if not only or stage.name in only]
    reached: dict[str, Record] = {}
    try:
        for stage in wanted:
            record = ledger.of(stage.name, facts.state)
            if not only and record is not None and record.status == "ok":
                reached[stage.name] = record
                continue
            left = end - clock()
            # A stage that would be ended before half of its time shows less than its start costs.
            if left <= 0 or (started and left < stage.limit / 2):
                continue
            started = True
            seconds = min(stage.limit, left)
            console.rule(f"{stage.name}, up to {seconds:.0f} s")
            reached[stage.name] = _record(stage, facts, Result("interrupted", reason="Ctrl-C"))
            result = stage_runner.run(stage, facts, seconds, folder, console.file)
            reached[stage.name] = _record(stage, facts, result)
            ledger.add(reached[stage.name])
    except KeyboardInterrupt:
        status = INTERRUPTED
    console.print(summary(wanted, reached))
    console.print(figures(folder))
    return status or int(any(has_failed(stage, reached.get(stage.name)) for stage in wanted))


def has_failed(stage: Stage, record: Record | None) -> bool:
    """A gate that was not reached has not been passed. A benchmark that ran out of time has what it kept."""
    if record is None:
        return stage.gate
    if record.status == "timed out" and not stage.gate:
        return not record.found
    return record.status not in ("ok", "absent")


def _record(stage: Stage, facts: Facts, result: Result) -> Record:
    known = (result.status, round(result.seconds, 1), result.found, result.reason)
    return Record(stage.name, *known, facts.state, date.today().isoformat())


def _interrupt(*_) -> None:
    """Whoever ends this program ends its stage's programs, which are in a group of their own."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
