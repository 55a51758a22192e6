"""How a stage is run: its programs one after the other, each with its share of the stage's time."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from . import findings, supervised
from .findings import Finding
from .preflight import ROOT, Facts

# The user's own choices would be measured in the place of what ships.
UNSET = ("FASTVIT_ARCH", "FASTVIT_BACKEND", "FASTVIT_DISABLE", "FASTVIT_UNMEASURED", "TRITON_INTERPRET")


class Absent(Exception):
    """Why a stage has nothing to run with here."""


class Already(Exception):
    """What a stage would make, and that is there."""


@dataclass(frozen=True)
class Command:
    """A program: {seconds} and {rows} in it stand for its time and for the file that its rows go to.

    ``weight`` is its share of the stage's time beside the others', of which it leaves what it does not use.
    """

    name: str
    argv: tuple[str, ...]
    read: Callable[[str, Path], Finding] = findings.last_line
    env: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Programs with a time limit in seconds; of a ``gate`` all must end well, or the whole run has failed."""

    name: str
    limit: float
    commands: Callable[[Facts], Sequence[Command]]
    gate: bool = False


@dataclass(frozen=True)
class Result:
    """``found`` is what the programs showed, ``reason`` why the status is not "ok"."""

    status: str
    seconds: float = 0.0
    found: str = ""
    reason: str = ""


def run(stage: Stage, facts: Facts, seconds: float, folder: Path, echo: TextIO) -> Result:
    """Run a stage's programs one after the other within so many seconds; all of them, whatever one gives."""
    try:
        commands = list(stage.commands(facts))
    except Absent as reason:
        return Result("absent", reason=str(reason))
    except Already as found:
        return Result("ok", found=str(found))
    start, statuses, found, reasons = time.monotonic(), set(), [], []
    while commands:
        left = seconds - (time.monotonic() - start)
        share = max(1.0, left * commands[0].weight / sum(command.weight for command in commands))
        command = commands.pop(0)
        status, finding, reason = _run(command, share, folder, echo)
        alone = not commands and not statuses
        statuses.add(status)
        if finding:
            found.append(finding if alone else f"{command.name} {finding}")
        if reason:
            reasons.append(reason if alone else f"{command.name}: {reason}")
    worst = next(status for status in ("failed", "timed out", "ok") if status in statuses)
    return Result(worst, time.monotonic() - start, "; ".join(found), "; ".join(reasons))


def _run(command: Command, seconds: float, folder: Path, echo: TextIO) -> tuple[str, str, str]:
    """Its status, what it found, and why that is not well."""
    rows, log = folder / f"{command.name}.json", folder / "logs" / f"{command.name}.log"
    # A tuner ends by itself, and keeps what it has, before it would be ended.
    known = {"{seconds}": f"{0.9 * seconds:.0f}", "{rows}": str(rows)}
    argv = [known.get(word, word) for word in command.argv]
    env = {name: value for name, value in os.environ.items() if name not in UNSET} | {"PYTHONUNBUFFERED": "1"}
    before = rows.stat().st_mtime_ns if rows.exists() else None
    how = {"seconds": seconds, "log": log, "echo": echo, "env": env | command.env, "cwd": ROOT}
    ended = supervised.run(argv, **how)
    if command.read is findings.kept_rows and rows.exists() and rows.stat().st_mtime_ns == before:
        finding = Finding("", "it kept no rows")  # those are an earlier run's
    else:
        finding = command.read(log.read_text(encoding="utf-8"), rows)
    if ended.status is None:
        return "timed out", finding.text, ended.why
    if ended.why or finding.fault:
        return "failed", finding.text, finding.fault or ended.why
    return "ok", finding.text, ""
