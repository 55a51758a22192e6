"""What a stage's programs found, from their logs and from the rows that they kept."""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from fastvit.backends import TABLE

from ..rows import OURS, ROOFS, Row, load

_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed|deselected)\b")
_TESTED = re.compile(r"\b\d+ \w+.* in [\d.]+s\b")
_SANITIZED = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.+)")


@dataclass(frozen=True)
class Finding:
    """In a few words, "" for nothing; and why that is a failure although the program ended well."""

    text: str
    fault: str = ""


def tests(log: str, rows: Path) -> Finding:
    """pytest's own count. A skipped test has shown nothing, so one is a failure."""
    lines = [line for line in log.splitlines() if _TESTED.search(line) and _COUNT.search(line)]
    counts = {what: int(number) for number, what in _COUNT.findall(lines[-1])} if lines else {}
    text = ", ".join(f"{number} {what}" for what, number in counts.items())
    if skipped := counts.get("skipped"):
        return Finding(text, f"{skipped} skipped")
    return Finding(text, "" if counts.get("passed") else "no test passed")


def sanitized(log: str, rows: Path) -> Finding:
    """compute-sanitizer's own summary, and that the calls under it came to their end."""
    summary = _SANITIZED.findall(log)
    if not summary or "calls ran" not in log:
        return Finding(summary[-1] if summary else "", "the calls did not come to their end")
    return Finding(summary[-1])


def last_line(log: str, rows: Path) -> Finding:
    """What a program says last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return Finding(lines[-1] if lines else "")


def kept_rows(log: str, rows: Path) -> Finding:
    """How many rows there are, and wrong ones among them."""
    found = measured(rows)
    if not found:
        return Finding("", "it kept no rows")
    wrong = sum(not row.ok for row in found)
    return Finding(f"{len(found)} rows" + (f", {wrong} wrong" if wrong else ""))


def measured(path: Path) -> list[Row]:
    """A file's rows without those of the machine's own roofline; none if it cannot be read."""
    try:
        return [row for row in load(path) if row.op not in ROOFS]
    except (OSError, ValueError):
        return []


@dataclass(frozen=True)
class Figure:
    """Our fastest provider of a call (or of an op's calls, by the geometric mean) and how it compares."""

    what: str
    direction: str
    dtype: str
    batch: str
    provider: str
    ms: float | None
    over_eager: float | None
    over_compiled: float | None


def figures(rows: list[Row]) -> list[Figure]:
    """One for each call of a model, and for each op and direction."""
    calls: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.ok and row.ms_p50:
            key = (row.op, row.direction, row.dtype, row.shape, row.batch)
            calls.setdefault(key, []).append(row)
    groups: dict[tuple, list[tuple[Row, float | None, float | None]]] = {}
    for (op, direction, dtype, _, batch), providers in calls.items():
        compared = _compared(providers)
        if compared is not None:
            of_an_op = op.partition(",")[0] in TABLE
            groups.setdefault((op, direction, dtype, "all" if of_an_op else str(batch)), []).append(compared)
    return [_figure(key, compared) for key, compared in groups.items()]


def _compared(rows: list[Row]) -> tuple[Row, float | None, float | None] | None:
    """Our fastest, and how many times as long the first that is not ours takes, and the compiler."""
    ours = min((row for row in rows if row.provider.startswith(OURS)), key=_ms, default=None)
    if ours is None:
        return None
    others = [row for row in rows if not row.provider.startswith(OURS)]
    compiled = min((row for row in others if "compiled" in row.provider), key=_ms, default=None)
    over = [None if row is None else row.ms_p50 / ours.ms_p50 for row in (next(iter(others), None), compiled)]
    return ours, *over


def _ms(row: Row) -> float:
    return row.ms_p50


def _figure(key: tuple, compared: list[tuple[Row, float | None, float | None]]) -> Figure:
    alone = compared[0][0] if len(compared) == 1 else None
    providers = {ours.provider for ours, _, _ in compared}
    means = []
    for column in (1, 2):
        known = [entry[column] for entry in compared if entry[column] is not None]
        means.append(geometric_mean(known) if known else None)
    return Figure(*key, "/".join(sorted(providers)), alone and alone.ms_p50, *means)
