"""What has been measured on which GPU: the shipped tables, and the user's own from `fastvit tune`.

A table is a JSON file with a list of rows:

    {"op": "attention", "gpu": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "direction": "fwd",
     "options": "", "head_dim": 64, "tokens": [1, 272], "batch_heads": [96, null], "ok": true, "ratio": 1.08,
     "torch": "2.14.1", "triton": "3.8.0", "date": "2026-11-25", "commit": "e0047ec"}

``dtype`` is torch's name, or "tf32" for float32 products in it; ``options`` names what the call has beside
the plain op, as in "norm+rope". ``ok`` is parity, ``ratio`` torch's time divided by ours where Python makes
the calls, and ``graphed``, which is optional, where a CUDA graph replays them: a small call may gain on the
GPU less than its launch costs on the host. A row without it says the same of both, and null is no word of
that one. Every other field bounds a size of the call: a number is met exactly, and [low, high] includes both
ends, null being open. The first row that covers a call decides, the user's own before the shipped ones. Rows
of the op "fc1_tile" are for the CUDA library (see ``fc1_tiles``), and name a ``tile`` beside.
"""

import importlib.util
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Bounds = tuple[tuple[str, int, int | None], ...]
Key = tuple[str, str, str, str, str]

NOTES = {"ok", "ratio", "graphed", "tile", "torch", "triton", "date", "commit"}
KEY = ("op", "gpu", "dtype", "direction", "options")


class Question(NamedTuple):
    """What `auto` asks the tables of a call."""

    op: str
    gpu: str
    dtype: str
    directions: tuple[str, ...]
    options: str
    sizes: dict[str, int]


class Measured(NamedTuple):
    """A table's row: the sizes that it covers, and what it says of them, in eager and in a graph."""

    bounds: Bounds
    ok: bool
    ratio: float | None
    graphed: float | None


class _Thread(threading.local):
    questions: list[Question] | None = None
    graphed: bool = False


_thread = _Thread()
# Another number once the tables may say otherwise.
generation = 0
_tables: dict[Key, tuple[Measured, ...]] | None = None


def refusal(
    op: str, gpu: str, dtype: str, directions: tuple[str, ...], options: str, sizes: dict
) -> str | None:
    """None if every direction of the call was measured right and no slower than torch's op, else why not.

    Inside ``for_graphs`` slower is what is slower in a graph, elsewhere what is slower in eager.
    """
    if not torch.compiler.is_compiling() and _thread.questions is not None:
        _thread.questions.append(Question(op, gpu, dtype, directions, options, sizes))
    asked, other = ("graphed", "ratio") if are_for_graphs() else ("ratio", "graphed")
    for direction in directions:
        rows = _rows(op, gpu, dtype, direction, options)
        row = _first(rows, sizes, asked)
        if row is None:
            return "not measured"
        if not row.ok:
            return "measured to miss the parity contract"
        if getattr(row, asked) < 1:
            beside = _first(rows, sizes, other)
            known = getattr(beside, other) if beside is not None and beside.ok else None
            return _slower({asked: getattr(row, asked), other: known})
    return None


def _slower(said: dict[str, float | None]) -> str:
    known = {value for value in said.values() if value is not None}
    if len(known) == 1:
        return f"measured at {known.pop():.2f} times torch's speed"
    return f"measured in eager {said['ratio']:.2f}, in a graph {said['graphed']:.2f} times torch's speed"


def any_of(op: str, gpu: str) -> bool:
    """Whether anything of the op was measured on this GPU to be right and no slower."""
    asked = "graphed" if are_for_graphs() else "ratio"
    for key, rows in _loaded().items():
        if key[:2] == (op, gpu) and any(row.ok and (getattr(row, asked) or 0.0) >= 1 for row in rows):
            return True
    return False


@contextmanager
def for_graphs() -> Iterator[None]:
    """What this thread runs in the ``with`` block is to be captured, or about to be: `auto` goes by that.

    All of it, the runs before a capture too: a kernel whose first run is in a capture cannot be loaded there.
    """
    outer, _thread.graphed = _thread.graphed, True
    try:
        yield
    finally:
        _thread.graphed = outer


def are_for_graphs() -> bool:
    """Whether calls of this thread are for a graph.

    A stream that someone else captures is no sign: what was run before, to load the kernels, was asked of
    eager, and the capture is to hold the same. Nor is torch.compile's mode "reduce-overhead": what is traced
    is not told whether it will be in a graph, and is run outside of one where shapes or inputs forbid it.
    """
    return not torch.compiler.is_compiling() and _thread.graphed


@contextmanager
def listening() -> Iterator[list[Question]]:
    """What this thread asks in the ``with`` block: a call's question is answered by rows of its fields."""
    outer, questions = _thread.questions, []
    _thread.questions = questions
    try:
        yield questions
    finally:
        _thread.questions = outer


def are_listened_to() -> bool:
    """Whether this thread's questions are noted: each call is to ask its own."""
    return _thread.questions is not None


def keep(rows: list[dict[str, Any]]) -> Path:
    """Add rows to the user's own table, in the place of those for the same calls; returns the file."""
    path = user_file()
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = {_identity(row) for row in rows}
    rows = [*rows, *(row for row in known if _identity(row) not in new)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    partial.replace(path)
    clear()
    return path


def _identity(row: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in NOTES}, sort_keys=True)


def user_file() -> Path:
    """Where the user's own measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastvit", "measured.json")


def clear() -> None:
    """Forget what was read: the next call reads the files anew."""
    global _tables, generation
    _tables = None
    generation += 1


def _first(rows: Iterable[Measured], sizes: dict, asked: str) -> Measured | None:
    """The row that decides: the first that covers the sizes and says something of what is asked."""
    for row in rows:
        if getattr(row, asked) is not None and _cover(row.bounds, sizes):
            return row
    return None


def _cover(bounds: Bounds, sizes: dict) -> bool:
    for name, low, high in bounds:
        if name not in sizes:
            return False
        # An open end is not compared: a compiler would take the comparison for a condition on the batch.
        if (low > 1 and sizes[name] < low) or (high is not None and sizes[name] > high):
            return False
    return True


def _rows(op: str, gpu: str, dtype: str, direction: str, options: str) -> tuple:
    return _loaded().get((op, gpu, dtype, direction, options), ())


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's: files are not traced.
_rows._dynamo_marked_constant = True


def rows_of(op: str) -> list[dict[str, Any]]:
    """The rows of an op as they are written, in the order in which they decide."""
    return [row for path in _files() for row in _read(path) if row["op"] == op]


def _files() -> Iterator[Path]:
    return filter(Path.is_file, (user_file(), *_shipped()))


def _loaded() -> dict:
    global _tables
    if _tables is None:
        tables: dict[Key, list] = {}
        for path in _files():
            for key, row in map(_parsed, _read(path)):
                tables.setdefault(key, []).append(row)
        _tables = {key: tuple(rows) for key, rows in tables.items()}
    return _tables


def _shipped() -> list[Path]:
    kernels = importlib.util.find_spec("fastvit_kernels")
    folders = (kernels and kernels.submodule_search_locations) or ()
    return sorted(path for folder in folders for path in Path(folder, "measured").glob("*.json"))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _parsed(row)
        return rows
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"fastvit: {path} is not a table of measurements ({problem}); ignored", stacklevel=2)
        return []


def _parsed(row: dict[str, Any]) -> tuple[Key, Measured]:
    key = tuple(str(row[name]) for name in KEY)
    bounds = []
    for name, bound in row.items():
        if name not in NOTES and name not in KEY:
            low, high = bound if isinstance(bound, list) else (bound, bound)
            bounds.append((name, int(low), None if high is None else int(high)))
    ratio, graphed = (
        None if value is None else float(value) for value in (row["ratio"], row.get("graphed", row["ratio"]))
    )
    return key, Measured(tuple(bounds), row["ok"] is True, ratio, graphed)
