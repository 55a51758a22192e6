"""What was begun and what came to its end, in a file that outlives the process.

A kernel that reads where it may not makes every later CUDA call of its process fail, and one that hangs never
comes back. Either costs what was under way: the process ends, and the next one reads here what not to try.
"""

import faulthandler
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch

from .rows import OURS

SECONDS, COMPILING = 30, 300
LOST = 70  # the exit status of a process whose CUDA context is lost
DIED, HUNG, NO_CONTEXT = (
    "its process died",
    "its process was ended by the watchdog",
    "its process lost the CUDA context",
)


class Attempts:
    """Notes in a file, a line each as it comes. Without a file nothing is noted, watched or checked."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self._open, self._seconds = file, None, None
        # What the last note of each name says, of earlier processes: None is an end, else how it died.
        self._before = _read(file) if file is not None and file.exists() else {}

    def died(self, name: str) -> str | None:
        """Why it did not come to its end in an earlier process; None if it did, or was not begun."""
        return self._before.get(name)

    def ended(self, name: str) -> bool:
        """Whether it came to its end in an earlier process."""
        return name in self._before and self._before[name] is None

    @contextmanager
    def __call__(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Note that it begins here, and that it ends, by an exception too, if the CUDA context is whole then.

        Args:
            seconds: the process is ended (status 1) after so long without `alive`, SECONDS by default;
                infinity waits for ever.
        """
        if self.file is None:
            yield
            return
        self._note(begun=name)
        self._seconds = SECONDS if seconds is None else seconds
        self.alive()
        # Whoever ends a process that is well, at its time limit say, ends it as Ctrl-C does: it did not die.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            self._check(name)
            signal.signal(signal.SIGTERM, before)
            self._seconds = None
            faulthandler.cancel_dump_traceback_later()
            self._note(ended=name)

    def alive(self) -> None:
        """What is under way goes on: its seconds begin anew."""
        if self._seconds is not None and self._seconds < math.inf:
            # The traceback goes into the file, where it says of what is begun that it hung.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._open)

    def _check(self, name: str) -> None:
        """A failed launch shows at the next synchronisation, and at every one after it."""
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            why = shorten(str(error).partition("\n")[0], 90, placeholder=" ...")
            self._note(lost=name, why=why)
            print(f"{name}: {NO_CONTEXT}: {why}", flush=True)
            sys.stderr.flush()
            os._exit(LOST)

    def _note(self, **words: str) -> None:
        if self._open is None:
            self._open = self.file.open("a", encoding="utf-8")
            if self._open.tell() and not self.file.read_bytes().endswith(b"\n"):
                self._open.write("\n")
        self._open.write(f"{json.dumps(words)}\n")
        self._open.flush()


def patience(provider: str, device: torch.device) -> float:
    """How long one of ours may be silent. A CPU's kernels do not hang, and others compile for minutes."""
    if device.type != "cuda" or not provider.startswith(OURS):
        return math.inf
    return COMPILING if "compiled" in provider else SECONDS


def _read(file: Path) -> dict[str, str | None]:
    """The last line may be torn, and the watchdog's traceback is in between."""
    found, last = {}, ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            note = json.loads(line)
        except ValueError:
            if line.startswith("Timeout (") and last in found:
                found[last] = HUNG
            continue
        if name := note.get("begun"):
            found[name], last = DIED, name
        elif name := note.get("lost"):
            found[name] = f"{NO_CONTEXT}: {note['why']}"
        elif name := note.get("ended"):
            found[name] = None
    return found
