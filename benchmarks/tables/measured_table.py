"""From calls that were measured to a table that `auto` goes by: rows that bound sizes between them.

Of a call's sizes one is what a model is made of (its width, or how many tokens an image has) and one how much
there is of it (rows of all images together). A row holds for all sizes between two that were measured, and
says the worst of those at its corners; beyond the most that was measured, what holds there holds on.

In eager and in a graph rows are bounded each by itself: the same sizes with the same end are one row.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

# Of each op: the size across which rows are bounded, and that along which. Every other is met exactly.
AXES = {"attention": ("tokens", "batch_heads")}
OTHERS = ("width", "rows")
# What goes with the size across: between two widths, all inner or outer widths between theirs.
TIED = ("hidden", "out")


@dataclass(frozen=True)
class Point:
    """A call that was measured: right or not, and torch's time divided by ours, in eager and in a graph."""

    op: str
    dtype: str
    direction: str
    options: str
    sizes: dict[str, int]
    ok: bool
    ratio: float
    graphed: float | None = None  # as in eager

    @property
    def axes(self) -> tuple[str, str]:
        return AXES.get(self.op, OTHERS)

    @property
    def across(self) -> int:
        return self.sizes[self.axes[0]]

    @property
    def along(self) -> int:
        return self.sizes[self.axes[1]]

    @property
    def exact(self) -> dict[str, int]:
        return {name: n for name, n in self.sizes.items() if name not in (*self.axes, *TIED)}

    @property
    def kind(self) -> tuple:
        """What a table's rows of it have in common."""
        return self.op, self.dtype, self.direction, self.options


@dataclass(frozen=True)
class Segment:
    """Sizes along from ``low`` to ``high`` (None: without end), and what was measured around them."""

    low: int
    high: int | None
    ok: bool
    ratio: float

    def taken(self, least: float) -> bool:
        return self.ok and self.ratio >= least


Taken = tuple[Sequence[list[Point]], Segment]  # a row's columns of points, and its sizes along


def table(points: Iterable[Point], notes: dict[str, Any], least: float = 1.0) -> list[dict[str, Any]]:
    """The rows, those first that are taken: a size on the border of two rows is as the better of them says.

    Args:
        notes: what each row says beside: gpu, torch, triton, date and commit.
        least: the ratio from which ours is taken.
    """
    points = list(points)
    eager, in_graphs = (_of_one(list(chosen), notes, least) for chosen in (points, map(_in_a_graph, points)))
    if eager == in_graphs:
        return _good_first(eager, least)
    rows = []
    for row in eager:
        twin = next((other for other in in_graphs if _says_as(row, other, least)), None)
        if twin is not None:
            in_graphs.remove(twin)
        rows.append(_with(row, row["ratio"], twin and twin["ratio"]))
    return _good_first(rows + [_with(row, None, row["ratio"]) for row in in_graphs], least)


def _in_a_graph(point: Point) -> Point:
    return point if point.graphed is None else replace(point, ratio=point.graphed)


def _says_as(row: dict[str, Any], other: dict[str, Any], least: float) -> bool:
    """Of the same sizes, and taken or left alike: one row has one place among those that are taken first."""
    alike = (row["ratio"] >= least) == (other["ratio"] >= least)
    return alike and all(other[name] == value for name, value in row.items() if name != "ratio")


def _with(row: dict[str, Any], ratio: float | None, graphed: float | None) -> dict[str, Any]:
    """With both, behind each other; a row of one number for both has that alone."""
    both = {"ratio": ratio} if ratio == graphed else {"ratio": ratio, "graphed": graphed}
    made: dict[str, Any] = {}
    for name, value in row.items():
        made |= both if name == "ratio" else {name: value}
    return made


def _good_first(rows: list[dict[str, Any]], least: float) -> list[dict[str, Any]]:
    def is_left(row: dict[str, Any]) -> bool:
        ratio = row["ratio"] if row["ratio"] is not None else row["graphed"]
        return not (row["ok"] and ratio >= least)

    return sorted(rows, key=is_left)


def _of_one(points: list[Point], notes: dict[str, Any], least: float) -> list[dict[str, Any]]:
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault((*point.kind, *sorted(point.exact.items())), []).append(point)
    return [row for group in groups.values() for row in _rows(group, notes, least)]


def _rows(group: list[Point], notes: dict[str, Any], least: float) -> Iterator[dict[str, Any]]:
    columns: dict[int, list[Point]] = {}
    for point in sorted(group, key=lambda point: (point.across, point.along)):
        columns.setdefault(point.across, []).append(point)
    alone = [(column,) for column in columns.values()]
    taken: list[Taken] = []
    # Between two first; then what holds at one alone, of which only the good is of use.
    for sides in [*pairwise(columns.values()), *alone]:
        for segment in _merged(_segments(sides), least):
            good = segment.taken(least)
            if good and not any(_covers(other, sides, segment) for other in taken):
                taken.append((sides, segment))
                yield _row(sides, segment, notes)
            elif not good and (len(sides) == 2 or len(columns) == 1):
                yield _row(sides, segment, notes)
    for (column,) in alone:
        for point in column:
            segment = Segment(point.along, point.along, point.ok, point.ratio)
            if segment.taken(least) and not any(_covers(other, (column,), segment) for other in taken):
                yield _row((column,), segment, notes)


def _segments(sides: Sequence[list[Point]]) -> Iterator[Segment]:
    start = max(column[0].along for column in sides)
    ends = sorted({point.along for column in sides for point in column if point.along > start})
    for low, high in pairwise([start, *ends, None]):
        around = [point for column in sides for point in _around(column, low, high)]
        yield Segment(low, high, all(p.ok for p in around), min(p.ratio for p in around))


def _around(column: list[Point], low: int, high: int | None) -> Iterator[Point]:
    """The nearest measured on either side of a segment; past the last, the last."""
    yield max((point for point in column if point.along <= low), key=lambda point: point.along)
    above = [point for point in column if high is not None and point.along >= high]
    if above:
        yield min(above, key=lambda point: point.along)


def _merged(segments: Iterable[Segment], least: float) -> list[Segment]:
    """Neighbours that say the same as one."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and last.taken(least) == segment.taken(least) and last.ok == segment.ok:
            merged[-1] = Segment(last.low, segment.high, last.ok, min(last.ratio, segment.ratio))
        else:
            merged.append(segment)
    return merged


def _covers(taken: Taken, sides: Sequence[list[Point]], segment: Segment) -> bool:
    other, over = taken
    within = other[0][0].across <= sides[0][0].across and sides[-1][0].across <= other[-1][0].across
    ends = over.high is None or (segment.high is not None and segment.high <= over.high)
    return within and over.low <= segment.low and ends


def _row(sides: Sequence[list[Point]], segment: Segment, notes: dict[str, Any]) -> dict[str, Any]:
    first = sides[0][0]
    across, along = first.axes
    bounds: dict[str, Any] = dict(first.exact) | {across: [sides[0][0].across, sides[-1][0].across]}
    for name in TIED:
        if values := [point.sizes[name] for column in sides for point in column if name in point.sizes]:
            bounds[name] = [min(values), max(values)]
    bounds[along] = [segment.low, segment.high]
    facts = {"op": first.op, "gpu": notes["gpu"], "dtype": first.dtype, "direction": first.direction}
    facts |= {"options": first.options} | bounds
    # Rounded down: 0.9996 is not 1.
    return facts | {"ok": segment.ok, "ratio": math.floor(1e3 * segment.ratio) / 1e3} | notes
