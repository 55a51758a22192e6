"""What the parity contract says about one tensor, and about many: a check and a report."""

import json
import math
from dataclasses import asdict, dataclass, field

from fastvit.errors import ParityError

# Each error stands beside its share of the limit.
_HEADINGS = ("check", "dtype", "rms", "max", "worst row", "verdict")


@dataclass(frozen=True)
class Check:
    """A verdict: the result's error (``e_``), torch's own (``b_``) and the limit, by rms, max and worst row.

    The row's numbers are plain or shares of the row's own size, whichever comes nearer its limit. Numbers
    that were not measured are nan.
    """

    name: str
    dtype: str
    kind: str
    e_rms: float = math.nan
    b_rms: float = math.nan
    limit_rms: float = math.nan
    e_max: float = math.nan
    b_max: float = math.nan
    limit_max: float = math.nan
    e_row: float = math.nan
    b_row: float = math.nan
    limit_row: float = math.nan
    ok: bool = False
    reason: str = ""

    @property
    def excess(self) -> float:
        """The worst error in units of its limit; infinite for a failure that has no number."""
        pairs = ((self.e_rms, self.limit_rms), (self.e_max, self.limit_max), (self.e_row, self.limit_row))
        measured = [ratio(error, limit) for error, limit in pairs if not math.isnan(error)]
        return max(measured, default=0.0 if self.ok else math.inf)

    def __str__(self) -> str:
        return f"{self.name} [{self.dtype}, {self.kind}] {'ok' if self.ok else f'failed: {self.reason}'}"


@dataclass
class Report:
    """Checks in the order they were made. One without a row has shown nothing, and is not ok."""

    rows: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was judged and all of it passed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise ``ParityError`` with a line for each failed check, the worst first."""
        if self.ok:
            return
        failed = sorted((row for row in self.rows if not row.ok), key=lambda row: -row.excess)
        title = f"{len(failed)} of {len(self.rows)} checks failed" if failed else "nothing was judged"
        raise ParityError("\n".join([title, *map(str, failed)]))

    def to_json(self) -> str:
        """The rows as a JSON list of objects. Numbers that JSON lacks (nan, inf) are strings."""
        rows = [{key: _jsonable(value) for key, value in asdict(row).items()} for row in self.rows]
        return json.dumps(rows)

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __rich__(self):
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADINGS, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for column in table.columns:
            column.no_wrap = True
        table.caption = "each error with its share of the limit"
        for row in self.rows:
            # Text, because a name may hold brackets, which a string cell would read as markup.
            cells = (*_cells(row)[:-1], "ok" if row.ok else "FAILED")
            table.add_row(*map(Text, cells), style=None if row.ok else "red")
        return table


def ratio(error: float, limit: float) -> float:
    """``error`` in units of ``limit``. Nothing exceeds an infinite limit; only exactness meets a zero one."""
    if error == 0 or math.isinf(limit):
        return 0.0
    return error / limit if limit else math.inf


def _cells(row: Check) -> tuple[str, ...]:
    pairs = ((row.e_rms, row.limit_rms), (row.e_max, row.limit_max), (row.e_row, row.limit_row))
    verdict = "ok" if row.ok else f"FAILED: {row.reason}"
    return row.name, row.dtype, *(_share(error, limit) for error, limit in pairs), verdict


def _share(error: float, limit: float) -> str:
    """An error and how much of its limit it uses: "5.0e-07  80%", or "3.1e-03 6e+03x" far beyond it."""
    if math.isnan(error):
        return "-"
    used = ratio(error, limit)
    return f"{error:.1e} {100 * used:3.0f}%" if used < 9.995 else f"{error:.1e} {used:.0e}x"


def _jsonable(value: str | float | bool) -> str | float | bool:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
