"""How a stage is run: its programs one after the other, each under `timeout` with its share.

A program that dies of a call notes which (``fastvit_benchmarks.attempts``) and is started again without it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .facts import ROOT, Facts
from .findings import Files, Finding, last_line

GRACE = 5  # seconds in which a program that was told to end may write what it has
AGAIN = 8.0  # seconds that a start is worth
AT_LIMIT = (124, 137, -signal.SIGKILL)  # of `timeout`, which is killed with a group that is deaf to SIGINT
# The user's own choices would be measured in the place of what ships.
UNSET = ("FASTVIT_ARCH", "FASTVIT_BACKEND", "FASTVIT_DISABLE", "FASTVIT_UNMEASURED", "TRITON_INTERPRET")


class Absent(Exception):
    """Why a stage has nothing to run with here."""


@dataclass(frozen=True)
class Command:
    """A program. In its words {seconds} stands for its time, {rows}, {tried} and {logs} for its ``Files``.

    ``read`` tells what it found from these. ``again`` are the words to add where it is started again because
    it died; None: it is not. Without any such words it goes on by itself, from run to run too.
    """

    name: str
    argv: tuple[str, ...]
    read: Callable[[Files], Finding] = last_line
    env: Mapping[str, str] = field(default_factory=dict)
    again: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """Programs with a time limit in seconds; of a ``gate`` all must end well, or the whole run has failed."""

    name: str
    seconds: float
    commands: Callable[[Facts], Sequence[Command]]
    gate: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: ``found`` is what it showed, ``reason`` why it is not "ok"."""

    stage: str
    status: str
    seconds: float = 0.0
    found: str = ""
    reason: str = ""


def environment() -> dict[str, str]:
    """One for all stages: a kernel that one of them has compiled is found by the next."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "fastvit")
    ours = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    ours |= {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    # Inductor makes torch's own ptxas Triton's, but only once it compiles; from then on every key is another.
    if (ptxas := _torch() / "bin" / "ptxas").is_file():
        ours["TRITON_PTXAS_PATH"] = str(ptxas)
    return kept | ours


def _torch() -> Path:
    return Path(find_spec("torch").origin).parent


def run(
    stage: Stage, facts: Facts, seconds: float, folder: Path, env: Mapping[str, str], console: Console
) -> Outcome:
    """Run a stage's programs one after the other within so many seconds; all of them, whatever one gives."""
    try:
        commands = list(stage.commands(facts))
    except Absent as reason:
        return Outcome(stage.name, "absent", reason=str(reason))
    start, statuses, found, reasons = time.monotonic(), set(), [], []
    alone = len(commands) == 1
    for place, command in enumerate(commands):
        left = seconds - (time.monotonic() - start)
        share = max(1.0, left / (len(commands) - place))
        status, finding, reason = _run(command, share, Files(folder, command.name), env, console)
        statuses.add(status)
        found += [finding if alone else f"{command.name} {finding}"] if finding else []
        reasons += [reason if alone else f"{command.name}: {reason}"] if reason else []
    worst = next(status for status in ("failed", "timed out", "ok") if status in statuses)
    return Outcome(stage.name, worst, time.monotonic() - start, "; ".join(found), "; ".join(reasons))


def _run(
    command: Command, seconds: float, files: Files, env: Mapping[str, str], console: Console
) -> tuple[str, str, str]:
    """Its status, what it found, and why that is not well."""
    files.logs.mkdir(parents=True, exist_ok=True)
    # What goes on by itself from run to run has its files; any other program begins anew.
    for old in (*files.logs.iterdir(), *(() if command.again == () else (files.rows, files.tried))):
        old.unlink(missing_ok=True)
    deaths, words, end = 0, (), time.monotonic() + seconds
    while True:
        left, begun = end - time.monotonic(), files.begun()
        argv = [_filled(word, files, left) for word in (*command.argv, *words)]
        status = _program(argv, left, files.log, dict(env) | dict(command.env), command.name, console)
        over = status in AT_LIMIT and time.monotonic() >= end - 0.5
        # It must have tried something that it had not tried before, or it would die of the same for ever.
        died = status and not over and command.again is not None and files.begun() > begun
        deaths += bool(died)
        if not died or end - time.monotonic() < AGAIN:
            break
        words = command.again
    finding = command.read(files)
    said = f"died {deaths} times of what it tried" if deaths else ""
    if over:
        within = f", within {name}" if (name := files.under_way()) else ""
        return "timed out", finding.text, f"ended at its limit of {seconds:.0f} s{within}"
    if status or finding.fault or deaths:
        return "failed", finding.text, "; ".join(filter(None, (finding.fault, _why(status), said)))
    return "ok", finding.text, ""


def _filled(word: str, files: Files, seconds: float) -> str:
    # A tuner ends by itself, and keeps what it has, before it would be ended.
    known = {"seconds": f"{0.9 * seconds:.0f}", "rows": files.rows, "tried": files.tried, "logs": files.logs}
    for name, value in known.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word


def _why(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""


def _program(
    argv: Sequence[str], seconds: float, log: Path, env: Mapping[str, str], title: str, console: Console
) -> int:
    """Its exit status: 124 or 137 at the limit. Its whole process group ends with it."""
    limited = ["timeout", "-s", "INT", "-k", str(GRACE), f"{max(1.0, seconds):.1f}", *argv]
    how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": dict(env)}
    seconds_of = TextColumn("{task.completed:.0f} of {task.total:.0f} s")
    columns = TextColumn("{task.description}"), BarColumn(), seconds_of
    with log.open("ab") as file, Progress(*columns, console=console, transient=True) as bar:
        process = subprocess.Popen(limited, stdout=file, process_group=0, **how)
        task, start = bar.add_task(title, total=seconds), time.monotonic()
        try:
            # Not reaped until its group is gone: till then nobody else's processes can have its number.
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                bar.update(task, completed=time.monotonic() - start)
                time.sleep(0.05)
        except KeyboardInterrupt:
            process.terminate()  # which `timeout` hands on, and after its grace kills
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode
