"""This run's rows of ours beside those of an earlier run on the same machine."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from .machine import Machine
from .rows import OURS, Row


@dataclass(frozen=True)
class Change:
    """A row of ours now and then, as times and as multiples of the first provider's time in the same run.

    A machine that is slower today moves the time alone, and a faster torch the multiple alone: a kernel that
    has become slower moves both. A row that has become wrong, does not run or is absent has no time.
    """

    now: Row | None
    then: Row
    time: float | None
    multiple: float | None

    def is_slower(self, allowed: float) -> bool:
        """By more than this part of the time then."""
        if self.time is None:
            return True
        return min(self.time, self.multiple or self.time) > 1 + allowed


def changes(now: list[Row], then: list[Row]) -> list[Change]:
    """What has become of each of ours that had a time then, among the calls that were measured now.

    Times that were taken in another way say nothing of each other.
    """
    found, calls = {(row.call, row.provider): row for row in now}, {row.call for row in now}
    firsts, firsts_then = _firsts(now), _firsts(then)
    made = []
    for old in then:
        if not old.provider.startswith(OURS) or not old.ok or old.call not in calls:
            continue
        row = found.get((old.call, old.provider))
        if row is None or not row.ok or row.ms_p50 is None:
            made.append(Change(row, old, None, None))
            continue
        if row.gpu and row.timed != old.timed:
            continue
        time, first, first_then = row.ms_p50 / old.ms_p50, firsts.get(old.call), firsts_then.get(old.call)
        multiple = time * first_then / first if first and first_then else None
        if row.speed and old.speed:
            multiple = old.speed / row.speed
        made.append(Change(row, old, time, multiple))
    return made


def _firsts(rows: Iterable[Row]) -> dict[tuple, float]:
    """The time of each call's first provider, which is not ours."""
    firsts: dict[tuple, float] = {}
    for row in rows:
        if row.ok and row.ms_p50 is not None and not row.provider.startswith(OURS):
            firsts.setdefault(row.call, row.ms_p50)
    return firsts


def check_machine(rows: list[Row], here: Machine, file: str) -> None:
    """Refuse rows of another machine.

    Raises:
        ValueError: naming both.
    """
    there = {row.machine for row in rows}
    own = here.gpu or f"{here.cpu}, {here.threads} threads"
    if there - {own}:
        raise ValueError(f"{file} was measured on {', '.join(sorted(there))}, and this is {own}")


def table(made: list[Change], allowed: float | None) -> Table:
    """Each of ours with its time then and now."""
    shown = Table(title="since the baseline", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("op", "provider", "dtype", "batch", "ms then", "ms now", "time", "over the first"):
        shown.add_column(name, justify="left" if name in ("op", "provider", "dtype") else "right")
    for change in made:
        old, now = change.then, change.now
        timed = now is not None and now.ok and now.ms_p50 is not None
        ms = f"{now.ms_p50:.4g}" if timed else "absent" if now is None else now.verdict.upper()
        ratios = ["-" if ratio is None else f"{ratio - 1:+.1%}" for ratio in (change.time, change.multiple)]
        style = "red" if allowed is not None and change.is_slower(allowed) else None
        name = f"{old.op} {old.direction}"
        cells = (name, old.provider, old.dtype, str(old.batch), f"{old.ms_p50:.4g}", ms, *ratios)
        shown.add_row(*cells, style=style)
    return shown
