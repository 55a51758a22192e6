"""Who ran what: for `explain`, what each op resolved to and which modules ran their own forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch


class Event(NamedTuple):
    """An op that was resolved, or with ``op`` None a module that ran its own forward."""

    module: str
    op: str | None
    backend: str
    accelerated: bool
    reason: str


class Recorder:
    """What happens in one thread, in the order it happens; ``module`` is the name of the one that is running.

    With ``calls`` a list, what each op was called with is kept in it too: (op, arguments, keywords).
    """

    def __init__(self, calls: list[tuple[str, tuple, dict[str, Any]]] | None = None) -> None:
        self.thread = get_ident()
        self.module = ""
        self.events: list[Event] = []
        self.calls = calls

    def add(self, op: str | None, backend: str, accelerated: bool, reason: str) -> None:
        self.events.append(Event(self.module, op, backend, accelerated, reason))


# A plain list, as that of `use_backend`: a compiler traces through the question whether it is empty, and no
# other thread sees it half changed.
active: list[Recorder] = []


@contextmanager
def recording(calls: list | None = None) -> Iterator[Recorder]:
    """Record what this thread runs inside the ``with`` block."""
    recorder = Recorder(calls)
    active.append(recorder)
    try:
        yield recorder
    finally:
        active.remove(recorder)


def listeners() -> list[Recorder]:
    """Those that record this thread."""
    if not active:
        return []
    thread = None if torch.compiler.is_compiling() else get_ident()
    return [recorder for recorder in list(active) if thread in (None, recorder.thread)]


@contextmanager
def inside(child: str) -> Iterator[None]:
    """What runs inside the ``with`` block is the child's of that name."""
    outer = [(recorder, recorder.module) for recorder in listeners()]
    for recorder, module in outer:
        recorder.module = f"{module}.{child}".lstrip(".")
    try:
        yield
    finally:
        for recorder, module in outer:
            recorder.module = module


def ran_its_own_forward(reason: object) -> None:
    """Note that a module that could be fused was not, and why."""
    for recorder in listeners():
        recorder.add(None, "original", False, str(reason))
