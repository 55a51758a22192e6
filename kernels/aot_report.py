"""What `python -m fastvit_kernels.aot` shows: a table, a line for each failure, a summary, and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton

from .aot_compile import Compiled

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"FAILED": "bold red", "ok": "green", "reported": "dim"}
COLUMNS = ("registers", "shared memory", "spilled", "mma", "hgmma", "waits", "seconds", "verdict")
# A pipe has no width of its own, and eighty columns would break every row.
PIPE_WIDTH = 180


def show(rows: Sequence[Compiled], seconds: float) -> None:
    """Print all of it, on a terminal or into a pipe."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(_table(rows))
    for row in rows:
        if row.faults:
            line = f"FAILED {row.arch} {row.kernel} ({row.label}): {'; '.join(row.faults)}"
            console.print(line, style=STYLES["FAILED"], soft_wrap=True)
    failed = sum(bool(row.faults) for row in rows)
    console.print(f"{len(rows)} kernels, {failed} failed, Triton {triton.__version__}, {seconds:.0f} s")


def save(path: Path, rows: Sequence[Compiled], seconds: float) -> None:
    """Write the rows as JSON, with the versions that compiled them."""
    table = [asdict(row) | {"verdict": row.verdict} for row in rows]
    made = {"triton": triton.__version__, "torch": torch.__version__, "seconds": round(seconds, 1)}
    path.write_text(json.dumps(made | {"rows": table}, indent=1) + "\n")


def _table(rows: Sequence[Compiled]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for name in ("kernel", "label", "arch"):
        table.add_column(name, no_wrap=name != "label")
    for name in COLUMNS:
        table.add_column(name, no_wrap=True, justify="left" if name == "verdict" else "right")
    for row in rows:
        share = f"{row.shared} ({row.shared / row.shared_limit:4.0%})" if row.shared_limit else "-"
        facts = (
            row.registers,
            share,
            row.spilled,
            row.mma,
            row.hgmma,
            row.waits,
            f"{row.seconds:.1f}",
            row.verdict,
        )
        table.add_row(row.kernel, row.label, row.arch, *map(str, facts), style=STYLES[row.verdict])
    return table
