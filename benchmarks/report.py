"""docs/benchmarks.md from the rows that were kept: `python -m fastvit_benchmarks.report docs/benchmarks.md`.

Each file under benchmarks/results/ becomes a section with its machine, versions and commits, a table, and a
picture. Nothing on the page is typed by hand.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from .columns import is_model
from .picture import draw
from .rows import ROOFS, Row, load

RESULTS = Path(__file__).parent / "results"
HEAD = """# Benchmarks

Every number here is a row that `fastvit bench` kept; `make report` writes this page from them. Each
provider was judged by the parity contract before it was timed, and a wrong one has no time. Providers ran
interleaved in one process: times are medians with their 20th and 80th percentiles, *speed* is the first
provider's time over this one's, *roofline* the share of what a large copy or product reached in the same
run, *error* the distance from float64 as a multiple of torch's own. An op on a GPU has two times: its
kernels' own, from replays of a CUDA graph (*queued*: from launches that lay ready; *wall*: neither could
be), and *eager*, what it adds to a chain of calls that Python makes.
"""
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "step": "training step"}


def page(folder: Path, pictures: str) -> str:
    """The whole page.

    Args:
        folder: of results, with a folder for each kind of machine.
        pictures: where the pictures are, as links from the page say it.
    """
    return "\n".join([HEAD, *(section(path, folder, pictures) for path in files(folder))])


def files(folder: Path) -> list[Path]:
    """Those with rows that a table can show, GPUs before CPUs."""
    found = [path for path in folder.glob("*/*.json") if _is_rows(path)]
    return sorted(found, key=lambda path: (path.parent.name == "cpu", path))


def _is_rows(path: Path) -> bool:
    try:
        return any(row.op not in ROOFS for row in load(path))
    except ValueError:
        return False  # a ledger, say


def section(path: Path, folder: Path, pictures: str) -> str:
    rows = load(path)
    roofs, calls = [row for row in rows if row.op in ROOFS], {}
    for row in rows:
        if row.op not in ROOFS:
            calls.setdefault(row.call, []).append(row)
    name = path.relative_to(folder).with_suffix("")
    picture = f"![{name}]({pictures}/{_picture(name)})\n"
    return "\n".join(
        [f"## {name}\n", f"{about(rows)}\n", *_roofline(roofs), *_table(calls.values()), picture]
    )


def about(rows: Iterable[Row]) -> str:
    """The machines, versions, commits and days of rows, in a line."""
    names = {"": "machine", "driver": "driver", "torch": "torch", "Triton": "triton"}
    names |= {"commit": "commit", "on": "date"}
    values = {word: sorted({getattr(row, name) or "" for row in rows} - {""}) for word, name in names.items()}
    return "; ".join(f"{word} {', '.join(found)}".strip() for word, found in values.items() if found) + "."


def _roofline(roofs: list[Row]) -> Iterator[str]:
    if roofs:
        copies = [f"a copy {row.gbps:.0f} GB/s" for row in roofs if row.op == "copy"]
        products = [
            f"{row.dtype} products {_number(row.tflops)} TFLOP/s" for row in roofs if row.op == "matmul"
        ]
        yield f"Roofline: {', '.join(dict.fromkeys(copies + products))}.\n"


def _table(calls: Iterable[list[Row]]) -> Iterator[str]:
    calls = list(calls)
    apart = any(row.eager_ms_p50 for rows in calls for row in rows)
    eager = ("eager ms", "eager speed") if apart else ()
    names = ("what", "provider", "ms", "p20 to p80", "speed", *eager, "per second", "roofline", "MB", "error")
    yield f"| {' | '.join(names)} |"
    yield f"|---|---|{'---:|' * (len(names) - 2)}"
    for rows in calls:
        timed = [row for row in rows if row.ok and row.ms_p50 is not None]
        for row in rows:
            yield "| " + " | ".join(_cells(row, timed[0] if timed else None, row is rows[0], apart)) + " |"
    yield ""


def _cells(row: Row, first: Row | None, named: bool, apart: bool) -> list[str]:
    shape = "x".join(map(str, row.shape))
    what = f"{row.op} {DIRECTIONS[row.direction]}, {row.dtype}, {shape}, batch {row.batch}"
    cells = [what if named else "", row.provider]
    if not row.ok or row.ms_p50 is None:
        said = "**wrong**" if row.verdict == "wrong" else row.verdict
        return [*cells, said, *[""] * (7 if apart else 5), _number(row.error_ratio)]
    images = f"{_number(1e3 * row.batch / row.ms_p50)} images"
    rate = images if is_model(row) else "" if row.tflops is None else f"{_number(row.tflops)} TFLOP"
    roof = "" if row.roofline_pct is None else f"{row.roofline_pct:.0f} %"
    spread = f"{_number(row.ms_p20)} to {_number(row.ms_p80)}"
    speed = f"{row.speed_over(first):.2f}x"
    memory = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    ms = _number(row.ms_p50) + (f" ({row.timed})" if row.timed in ("queued", "wall") and apart else "")
    in_eager = "" if row.eager_speed is None else f"{row.eager_speed:.2f}x"
    eager = [_number(row.eager_ms_p50), in_eager] if apart else []
    return [*cells, ms, spread, speed, *eager, rate, roof, memory, _number(row.error_ratio)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _picture(name: Path) -> str:
    return f"{str(name).replace('/', '-')}.png"


def main(
    file: Annotated[Path, typer.Argument(help="Where the page goes; pictures go beside it.")],
    results: Annotated[Path, typer.Option(help="The folder of results.")] = RESULTS,
) -> None:
    pictures = file.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for path in track(files(results), "drawing", transient=True):
        draw(load(path), pictures / _picture(path.relative_to(results).with_suffix("")))
    file.write_text(page(results, pictures.name), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
