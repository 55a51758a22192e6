"""One call by many providers, of which each costs its own rows and nothing else, whatever it does.

torch's and other libraries' come first: they are prepared, judged and timed as one group, and their rows are
kept. Then comes each of ours, in an attempt of its own, timed in rounds with the baseline alone: a speed is a
ratio within rounds.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch

from fastvit.verdicts import Check

from .attempts import patience
from .harness import Call, Row, Stopped, Timing, ratios
from .outputs import Outputs
from .rows import OURS, WRONG


class Bench(ABC):
    """A call in one direction or several; the first provider is the baseline, if it is not ours.

    What is found is by provider: checks, memory, why it is absent; and by direction and provider: times, why
    it was not timed, and of those that are right the speed as a multiple of the baseline's; as Python calls
    them too, where the GPU's time alone was taken.
    """

    def __init__(
        self, title: str, directions: Sequence[str], device: torch.device, outputs: Outputs | None = None
    ) -> None:
        self.title, self.directions, self.device = title, directions, device
        self.outputs = Outputs() if outputs is None else outputs
        self.calls: dict[str, dict[str, Call]] = {}  # by provider and direction, while they are needed
        self.checks: dict[str, list[Check]] = {}
        self.peaks: dict[str, float | None] = {}
        self.absent: dict[str, str] = {}
        self.timings: dict[str, dict[str, Timing]] = defaultdict(dict)
        self.untimed: dict[str, dict[str, str]] = defaultdict(dict)
        self.speeds: dict[str, dict[str, float]] = defaultdict(dict)
        self.eager_speeds: dict[str, dict[str, float]] = defaultdict(dict)
        self.rows: list[Row] = []
        self.baseline: str | None = None

    @abstractmethod
    def begin(self) -> None:
        """Make what all providers need."""

    @abstractmethod
    def prepare(self, name: str) -> dict[str, Call]:
        """Judge the provider and return its calls by direction."""

    @abstractmethod
    def measure(self, direction: str, calls: dict[str, Call]) -> dict[str, Timing]:
        """Time the providers in rounds."""

    @abstractmethod
    def row(self, timing: Timing | None, **facts: Any) -> Row:
        """With what is the same for all providers; ``facts`` are this one's."""

    def run(self, names: Iterable[str]) -> None:
        """Judge and time the providers, and keep their rows as they come: at Ctrl-C, of whole rounds."""
        names = list(names)
        theirs = [name for name in names if not name.startswith(OURS)]
        self.baseline = names[0] if names and names[0] in theirs else None
        self._attempt("inputs", names, self.begin)
        for name in theirs:
            self._attempt(name, [name], lambda name=name: self._judge(name))
        self._attempt("times of others", theirs, lambda: self._time(theirs))
        self._keep(theirs)
        # Compiled models and what they hold go before ours come.
        self.calls = {name: calls for name, calls in self.calls.items() if name == self.baseline}
        for name in names:
            if name not in theirs:
                self._attempt(name, [name], lambda name=name: (self._judge(name), self._time([name])))
                self._keep([name])
                self.calls.pop(name, None)

    def right(self, name: str) -> bool:
        return name in self.checks and all(check.ok for check in self.checks[name])

    def _attempt(self, what: str, names: Iterable[str], work: Callable[[], object]) -> None:
        """Do this unless a process died of it; what it is to give to these providers they may then lack."""
        attempts, key = self.outputs.attempts, f"{self.title}: {what}"
        names = [name for name in names if name not in self.absent]
        if not names:
            return
        reason = attempts.died(key)
        if reason is None:
            try:
                with attempts(key, patience(what, self.device)):
                    work()
            except Exception as error:  # each library raises its own for what it cannot run
                reason = in_words(error)
        if reason is not None:
            self.absent |= dict.fromkeys(names, reason)
            for name in names:
                self.calls.pop(name, None)

    def _judge(self, name: str) -> None:
        calls = self.prepare(name)
        self.outputs.attempts.alive()
        if self.right(name) or not name.startswith(OURS):
            self.calls[name] = calls

    def _time(self, names: list[str]) -> None:
        for direction in self.directions:
            calls = {name: calls[direction] for name, calls in self.calls.items()}
            if calls.keys().isdisjoint(names):
                return
            try:
                self._note(names, direction, self.measure(direction, calls))
            except Stopped as stop:
                self._note(names, direction, stop.timings)
                self._keep(names)
                raise
            except Exception as error:  # of memory, say, that another direction does not need
                self.untimed[direction] |= {name: in_words(error) for name in names if name in calls}

    def _note(self, names: list[str], direction: str, found: dict[str, Timing]) -> None:
        """Times of these; the baseline has its own already when others are timed with it."""
        self.timings[direction] |= {name: found[name] for name in names if name in found}
        if self.baseline in found and self.right(self.baseline):
            right = [name for name in names if self.right(name)]
            eager = {name: timing.in_eager for name, timing in found.items()}
            self.speeds[direction] |= _of(right, ratios(found, self.baseline))
            if found[self.baseline].eager:
                self.eager_speeds[direction] |= _of(right, ratios(eager, self.baseline))

    def _keep(self, names: list[str]) -> None:
        """The rows of those that have a time, or a reason to have none."""
        made = []
        for direction in self.directions:
            for name in names:
                timing, reason = self.timings[direction].get(name), self._reason(name, direction)
                if timing or reason:
                    facts = {"provider": name, "direction": direction, "peak_mb": self.peaks.get(name)}
                    facts |= {"ok": not reason, "reason": reason, "speed": self.speeds[direction].get(name)}
                    facts["eager_speed"] = self.eager_speeds[direction].get(name)
                    made.append(self.row(timing, **facts))
        self.rows += made
        self.outputs.keep(made)

    def _reason(self, name: str, direction: str) -> str | None:
        if reason := self.absent.get(name) or self.untimed[direction].get(name):
            return reason
        failed = next((check for check in self.checks.get(name, []) if not check.ok), None)
        return failed and f"{WRONG}: {failed}"


def _of(names: list[str], speeds: dict[str, float]) -> dict[str, float]:
    return {name: speed for name, speed in speeds.items() if name in names}


def in_words(error: BaseException) -> str:
    """An error in part of a line."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        text = "not enough memory"
    return shorten(text.splitlines()[0], 90, placeholder=" ...")


@contextmanager
def at_its_best() -> Iterator[None]:
    """torch at its best, compiled backwards that may run many times, and nothing said of what cannot run."""
    logging.disable(logging.WARNING)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
        logging.disable(logging.NOTSET)


def peak_mb(call: Call, device: torch.device) -> float | None:
    """The most memory that a call held beside its inputs, in 10^6 bytes; a CPU's allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
