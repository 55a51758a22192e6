"""`make gpu`: everything that only a GPU shows, in stages, the most telling first, within a budget.

    make gpu                                         # in the environment that make keeps
    make gpu STAGES="parity ops"                     # these alone, in this order
    python -m fastvit_benchmarks.gpu --budget 340    # seconds; with another Python

A machine that has neither a network nor an installation of fastvit takes what `make gpu-pack` made elsewhere:

    PYTHONPATH=PACK/path:. python -m fastvit_benchmarks.gpu --packed PACK --results OUT --archive day.tgz

Results go to benchmarks/results/<gpu>/: a file of rows a benchmark, stages.json with what became of each
stage, report.txt, and logs. Whatever ends the run, the archive has all stages before. The exit status is 1 if
a gate (tests, sanitizers) is anything but passed or a benchmark failed, and 130 after Ctrl-C.
"""

import datetime
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .. import files
from ..machine import commit
from . import packed, report, runner, stages
from .facts import ROOT, Facts
from .findings import Files
from .runner import Outcome, Stage

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended
LEAST = 0.7  # the share of its seconds with which a stage is worth its start
WRITTEN = ("kernels/measured", "kernels/tiles")  # by stages, beside the results


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Stages to run, in this order; else all.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all of them.")] = 1200,
    results: Annotated[Path, typer.Option(help="Where the GPU's folder of results goes.")] = ROOT
    / "benchmarks"
    / "results",
    pack: Annotated[Path | None, typer.Option("--packed", help="What `make gpu-pack` made.")] = None,
    archive: Annotated[Path | None, typer.Option(help="Renewed after each stage, with all results.")] = None,
) -> None:
    """Test, tune and measure on this machine's GPU."""
    end, console = time.monotonic() + budget, _console()
    known = {stage.name: stage for stage in stages.STAGES}
    if unknown := [name for name in only or () if name not in known]:
        raise typer.BadParameter(f"unknown stage {unknown[0]}; the stages are {', '.join(known)}")
    signal.signal(signal.SIGTERM, _interrupt)
    wanted = [known[name] for name in dict.fromkeys(("facts", *only))] if only else list(stages.STAGES)
    env = runner.environment()
    if pack is not None:
        os.environ |= packed.unpack(pack, Path(env["TRITON_CACHE_DIR"]))
        env = runner.environment()
    raise typer.Exit(run(wanted, results, env, console, end=end, archive=archive))


def run(
    wanted: Sequence[Stage],
    results: Path,
    env: Mapping[str, str],
    console: Console,
    *,
    end: float,
    archive: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the stages, of which the first tells what machine this is, until the time is over.

    Returns:
        The exit status.
    """
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as scratch:
        first = runner.run(
            wanted[0], None, min(wanted[0].seconds, end - clock()), Path(scratch), env, console
        )
        if first.status != "ok":
            said = Files(Path(scratch), "facts").log.read_text(encoding="utf-8").strip()
            sys.exit(said or f"gpu: {first.reason}")
        facts = Facts.load(Path(scratch, "facts.json"))
        folder = (results / facts.slug).absolute()
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
    console.print(escape(first.found))
    for note in facts.notes():
        console.print(f"[yellow]{escape(note)}")
    outcomes[first.stage], status, before = first, 0, _compiled(env)
    try:
        for stage, seconds in _timed(wanted[1:], end, clock):
            outcomes[stage.name] = Outcome(stage.name, "interrupted", reason="Ctrl-C")
            outcomes[stage.name] = found = runner.run(stage, facts, seconds, folder, env, console)
            said = ": ".join(filter(None, (found.found, found.reason)))
            console.print(f"{stage.name}: {found.status}, {found.seconds:.0f} s: {escape(said)}")
            _keep(outcomes, folder, archive)
    except KeyboardInterrupt:
        status = INTERRUPTED
    with (folder / "report.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=160)):
            target.print(f"{_compiled(env) - before} entries of Triton's cache were made here")
            target.print(report.page(wanted, outcomes, folder), soft_wrap=True, highlight=False)
    _keep(outcomes, folder, archive)
    return status or int(any(has_failed(stage, outcomes.get(stage.name)) for stage in wanted))


def _compiled(env: Mapping[str, str]) -> int:
    """Of kernels and of what launches them."""
    return sum(1 for _ in Path(env.get("TRITON_CACHE_DIR", "")).glob("*/"))


def _timed(wanted: Sequence[Stage], end: float, clock: Callable[[], float]):
    """The stages with their seconds. Those that the budget can hold are all begun, whatever one takes.

    What ends early leaves its time to the others; what comes after them is begun if there is enough left.
    """
    budget, held = end - clock(), 0
    while held < len(wanted) and LEAST * sum(stage.seconds for stage in wanted[: held + 1]) <= budget:
        held += 1
    for place, stage in enumerate(wanted):
        left = end - clock()
        later = LEAST * sum(other.seconds for other in wanted[place + 1 : held])
        seconds = min(stage.seconds, left - later)
        if seconds > 1 and (place == 0 or place < held or seconds >= LEAST * stage.seconds):
            yield stage, seconds


def has_failed(stage: Stage, outcome: Outcome | None) -> bool:
    """A gate that was not reached has not been passed. A benchmark that ran out of time has what it kept."""
    if outcome is None:
        return stage.gate
    if outcome.status == "timed out" and not stage.gate:
        return not outcome.found
    return outcome.status not in ("ok", "absent")


def _keep(outcomes: Mapping[str, Outcome], folder: Path, archive: Path | None) -> None:
    notes = {"commit": commit() or "", "date": datetime.date.today().isoformat()}
    files.write_rows(folder / "stages.json", [asdict(outcome) | notes for outcome in outcomes.values()])
    if archive is None:
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f"{archive.name}.{os.getpid()}")
    with tarfile.open(partial, "w:gz", compresslevel=3) as tar:
        tar.add(folder, f"benchmarks/results/{folder.name}")
        for name in WRITTEN:
            tar.add(ROOT / name, name)
    partial.replace(archive)


def _console() -> Console:
    """As wide as the terminal; a pipe has no width of its own, and eighty columns would break every row."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _interrupt(*_) -> None:
    """Whoever ends this program ends its stage's programs, which are in a group of their own."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(typer.run(main))
