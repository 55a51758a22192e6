"""Who ran what: for `explain`, what each op resolved to and which modules ran their own forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Event(NamedTuple):
    """An op that was resolved, or with ``op`` None a module that ran its own forward."""

    module: str
    op: str | None
    backend: str
    accelerated: bool
    reason: str


class Recorder:
    """What happens in the order it happens; ``module`` is the name of the one that is running.

    With ``calls`` a list, what each op was called with is kept in it too: (op, arguments, keywords).
    """

    def __init__(self, calls: list[tuple[str, tuple, dict[str, Any]]] | None = None) -> None:
        self.module = ""
        self.events: list[Event] = []
        self.calls = calls

    def add(self, op: str | None, backend: str, accelerated: bool, reason: str) -> None:
        self.events.append(Event(self.module, op, backend, accelerated, reason))


# A plain list, as the backends' stack is: a compiler traces through the question whether it is empty.
active: list[Recorder] = []


@contextmanager
def recording(calls: list | None = None) -> Iterator[Recorder]:
    """Record what runs inside the ``with`` block, in this process."""
    recorder = Recorder(calls)
    active.append(recorder)
    try:
        yield recorder
    finally:
        active.remove(recorder)


@contextmanager
def inside(child: str) -> Iterator[None]:
    """What runs inside the ``with`` block is the child's of that name."""
    modules = [recorder.module for recorder in active]
    for recorder in active:
        recorder.module = f"{recorder.module}.{child}".lstrip(".")
    try:
        yield
    finally:
        for recorder, module in zip(active, modules, strict=True):
            recorder.module = module


def ran_its_own_forward(reason: object) -> None:
    """Note that a module that could be fused was not, and why."""
    for recorder in active:
        recorder.add(None, "original", False, str(reason))
