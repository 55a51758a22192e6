"""Which calls our kernels serve no slower than torch on this GPU: the table that `auto` goes by.

    python -m fastvit_benchmarks.tables.measure_gpu [--seconds 120] [--points FILE] [--tried FILE]

The very questions that `auto` asks of the models below, the most important first: in bfloat16, float16, tf32
and float32, forward and backward, at batches of 1 to 256. After them, on Hopper, whether fc1 is to have its
activation in its epilogue (rows with the options "fused") and QKV and it the norm before ("folded"). Each is
measured as Python calls it and in a graph, which are two verdicts.
kernels/measured/<gpu>.json is written after each; with ``--points`` the next run goes on where this
one ended, and with ``--tried`` without the call that it died of.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastvit_kernels
from fastvit import extension

from .. import files
from ..attempts import Attempts
from ..gpu.facts import HOPPER, slug
from ..machine import machine, sources
from ..op_bench import run_case
from .gpu_questions import MODELS, MODES, Asked, folded, fused, of_models
from .measured_table import Point, table

ROUNDS, SECONDS = 15, 0.05
# Whether ours is right; torch's time by its own in eager, and in a graph, if that is another.
Found = tuple[bool, float, float | None]
Measure = Callable[[Asked], Found | str]


def measured(asked: Asked, device: torch.device) -> Found | str:
    """What was found of ours, or why one of the two does not run."""
    providers = {"torch": asked.torchs, "ours": asked.ours}
    outcome = run_case(asked.case, providers, device, machine(), rounds=ROUNDS, seconds=SECONDS)
    if outcome.absent:
        return "; ".join(f"{name}: {reason}" for name, reason in outcome.absent.items())
    return all(check.ok for check in outcome.checks["ours"]), *outcome.ratios("ours")


@dataclass
class Book:
    """The points so far, the table that they make, and the points' own file, if there is one.

    ``state`` is what they depend on: points of another one are not taken over.
    """

    file: Path
    notes: dict[str, Any]
    state: str = ""
    points_file: Path | None = None

    def __post_init__(self) -> None:
        self.points: dict[str, Point] = {}
        self.before = _read(self.file)
        for row in _read(self.points_file):
            if row.pop("state", None) == self.state:
                self.add(Point(**row))

    def has(self, point: Point) -> bool:
        return _key(point) in self.points

    def add(self, point: Point) -> None:
        self.points[_key(point)] = point

    def write(self) -> None:
        """The table, with an earlier one's rows of what is not measured yet."""
        rows, known = table(self.points.values(), self.notes), {p.kind for p in self.points.values()}
        fields = ("op", "dtype", "direction", "options")
        rows += [row for row in self.before if tuple(row[name] for name in fields) not in known]
        files.write_rows(self.file, rows)
        if self.points_file is not None:
            kept = (asdict(point) | {"state": self.state} for point in self.points.values())
            files.write_rows(self.points_file, kept)


def _key(point: Point) -> str:
    return json.dumps((*point.kind, point.sizes), sort_keys=True)


def _read(path: Path | None) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else []
    except (OSError, ValueError):
        return []


def run(
    asked: Iterable[Asked],
    measure: Measure,
    book: Book,
    *,
    deadline: float,
    say: Callable[[str], None],
    attempts: Attempts,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure what the book lacks until the time is over; returns how many that were."""
    count = 0
    for one in asked:
        if clock() >= deadline:
            break
        if book.has(one.point):
            continue
        title, name = f"{one.case.title} {one.point.options}".rstrip(), f"{book.state} {_key(one.point)}"
        found = attempts.died(name)
        if found is None:
            with attempts(name):
                found = measure(one)
        if isinstance(found, str):
            say(f"  -    {title}: {found}")
            continue
        ok, ratio, graphed = found
        beside = "" if graphed is None else f" in eager, {graphed:.2f}x in a graph"
        say(f"{ratio:5.2f}x{beside} {'' if ok else 'WRONG '}{title}")
        book.add(Point(**vars(one.point) | {"ok": ok, "ratio": ratio, "graphed": graphed}))
        book.write()
        count += 1
    return count


def main(
    seconds: Annotated[float, typer.Option(min=1, help="When to begin no other call.")] = 120,
    points: Annotated[Path | None, typer.Option(help="Where the points are kept from run to run.")] = None,
    tried: Annotated[Path | None, typer.Option(help="Where it is noted what a run may die of.")] = None,
    models: Annotated[int | None, typer.Option(min=1, help="Only so many, the most used first.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODES)}; repeatable.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again.")] = False,
) -> None:
    """Measure what `auto` asks on this machine's GPU."""
    deadline, here, modes = time.monotonic() + seconds, machine(), tuple(dtype or MODES)
    if unknown := [name for name in modes if name not in MODES]:
        sys.exit(f"measure_gpu: unknown dtype {unknown[0]!r}; the dtypes are {', '.join(MODES)}")
    if here.gpu is None:
        sys.exit("measure_gpu: torch finds no CUDA GPU")
    device, folder = torch.device("cuda", torch.cuda.current_device()), Path(fastvit_kernels.__file__).parent
    notes = {"gpu": here.gpu, "torch": here.torch, "triton": here.triton or ""}
    notes |= {"date": date.today().isoformat(), "commit": here.commit or ""}
    if fresh:
        for file in filter(None, (points, tried)):
            file.unlink(missing_ok=True)
    tiles = "".join(path.read_text() for path in sorted((folder / "tiles").glob("*.json")))
    depends = hashlib.sha256("\0".join((sources(), here.torch, here.triton or "", tiles)).encode())
    book = Book(folder / "measured" / f"{slug(here.gpu)}.json", notes, depends.hexdigest()[:16], points)
    measure, count = partial(measured, device=device), 0
    how = {"deadline": deadline, "say": print, "attempts": Attempts(tried)}
    count += run(of_models(device, MODELS[:models], [m for m in MODES if m in modes]), measure, book, **how)
    if torch.cuda.get_device_capability(device) == HOPPER and extension.build_info().cutlass != "none":
        asked = (one for one in chain(fused(), folded()) if one.point.dtype in modes)
        count += run(asked, measure, book, **how)
    right = [point for point in book.points.values() if point.ok]
    eager = sum(point.ratio >= 1 for point in right)
    graphed = sum((point.graphed or point.ratio) >= 1 for point in right)
    good = f"{eager} of {len(book.points)} right and no slower, {graphed} in graphs"
    print(f"{count} calls measured, {good}, in {book.file.name}")


if __name__ == "__main__":
    typer.run(main)
