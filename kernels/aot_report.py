"""What `python -m fastvit_kernels.aot` shows: a table, a line for each failure, a summary, and JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton

from .aot_compile import Compiled
from .aot_static import Body, Row

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"FAILED": "bold red", "ok": "green", "reported": "dim"}
COLUMNS = ("registers", "shared memory", "spilled", "mma", "hgmma", "waits", "seconds", "verdict")
STATIC_COLUMNS = (
    *("launch", "registers", "shared", "CTAs x warps", "issue", "MUFU", "ALU", "HGMMA", "waits", "barriers"),
    *("tensor", "trips", "loops us (by)", "DRAM us", "modelled us"),
)
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


def show_static(rows: Sequence[Row], markdown: bool) -> None:
    """Print what the machine code asks for, a line for each loop, as a table or in Markdown."""
    lines = [line for row in rows for line in _static_lines(row)]
    notes = [f"{row.label}: trips unknown, {row.unknown}" for row in rows if row.unknown]
    if markdown:
        for cells in (STATIC_COLUMNS, ["---"] * len(STATIC_COLUMNS), *lines):
            print(f"| {' | '.join(cells)} |")
        print("\n".join(["", *notes, f"Triton {triton.__version__}, sm_90, modelled."]))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 2 * PIPE_WIDTH
    table = Table(*STATIC_COLUMNS, box=SIMPLE)
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    console.print("\n".join([*notes, f"Triton {triton.__version__}, sm_90, modelled."]), soft_wrap=True)


def _static_lines(row: Row) -> Iterator[list[str]]:
    name = f"{row.kernel.strip('_').removesuffix('_kernel')} {row.label}"
    facts = [name, str(row.registers), str(row.shared), f"{row.ctas} x {row.warps // max(1, row.ctas)}"]
    low, high = row.modelled
    times = [f"{row.floor:.0f} ({row.bound})", f"{row.dram:.0f}", f"{low:.0f}-{high:.0f}"]
    if not row.trips:
        times = ["-", f"{row.dram:.0f}", "-"]
    for index, body in enumerate(row.bodies):
        trips = str(row.trips[index]) if row.trips else "-"
        yield [
            *(facts if index == 0 else [""] * 4),
            *_cells(body),
            trips,
            *(times if index == 0 else [""] * 3),
        ]
    if not row.bodies:
        yield [*facts, *["-"] * 8, *times]


def _cells(body: Body) -> list[str]:
    shapes = ", ".join(f"{count} {shape}" for shape, count in body.products.items()) or "-"
    return [
        *map(str, (body.issue, body.mufu, body.alu)),
        *(shapes, str(body.waits), str(body.barriers), str(body.tensor)),
    ]
