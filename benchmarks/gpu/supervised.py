"""A program under a time limit: in a process group of its own, whose every process ends with it."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, TextIO

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
POLL = 0.05


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status (minus the signal that ended it), None at the limit."""

    status: int | None
    seconds: float

    @property
    def why(self) -> str:
        """What is wrong with that, or ""."""
        if self.status is None:
            return f"ended at its limit of {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" if self.status else ""


def run(
    argv: Sequence[str], *, seconds: float, log: Path, echo: TextIO, env: Mapping[str, str], cwd: Path
) -> Ended:
    """Run it for at most so many seconds; what it says goes to ``log`` and, as it comes, to ``echo``.

    Ctrl-C, or any other exception here, ends its processes too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=dict(env),
            cwd=cwd,
        )
        reader = Thread(target=_copy, args=(process.stdout, (file, echo)), daemon=True)
        reader.start()
        status = None
        try:
            if _has_ended(process.pid, seconds):
                # Not reaped yet: until then nobody else's processes can have its number.
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
        finally:
            if process.returncode is None:
                _end(process)
            reader.join(GRACE)
    return Ended(status, time.monotonic() - start)


def _has_ended(pid: int, seconds: float) -> bool:
    """Waits so long for it, without reaping it."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    return True


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    _has_ended(process.pid, GRACE)
    os.killpg(process.pid, signal.SIGKILL)
    if _has_ended(process.pid, GRACE):  # one that a driver holds does not end at all
        process.wait()


def _copy(source: IO[str], targets: Sequence[TextIO]) -> None:
    for line in source:
        for target in targets:
            if not target.closed:
                target.write(line)
                target.flush()
