"""What has been measured on which GPU: the shipped tables, and the user's own from `fastvit tune`.

A table is a JSON file with a list of rows:

    {"op": "attention", "gpu": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "direction": "fwd",
     "options": "", "head_dim": 64, "tokens": [1, 272], "batch_heads": [96, null], "ok": true, "ratio": 1.08,
     "torch": "2.14.1", "triton": "3.8.0", "date": "2026-11-25", "commit": "e0047ec"}

``dtype`` is torch's name, or "tf32" for float32 products in it; ``options`` names what the call has beside
the plain op, as in "norm+rope". ``ok`` is parity, ``ratio`` torch's time divided by ours. Every other field
bounds a size of the call: a number is met exactly, and [low, high] includes both ends, null being open.
The first row that covers a call decides, the user's own before the shipped ones. Rows of the op "fc1_tile"
are for the CUDA library (see ``fc1_tiles``), and name a ``tile`` beside.
"""

import importlib.util
import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Bounds = tuple[tuple[str, int, int | None], ...]
Key = tuple[str, str, str, str, str]

NOTES = {"ok", "ratio", "tile", "torch", "triton", "date", "commit"}
KEY = ("op", "gpu", "dtype", "direction", "options")


class Question(NamedTuple):
    """What `auto` asks the tables of a call."""

    op: str
    gpu: str
    dtype: str
    directions: tuple[str, ...]
    options: str
    sizes: dict[str, int]


class _Thread(threading.local):
    questions: list[Question] | None = None


_thread = _Thread()
# Another number once the tables may say otherwise.
generation = 0
_tables: dict[Key, tuple[tuple[Bounds, str | None], ...]] | None = None


def refusal(
    op: str, gpu: str, dtype: str, directions: tuple[str, ...], options: str, sizes: dict
) -> str | None:
    """None if every direction of the call was measured right and no slower than torch's op, else why not."""
    if not torch.compiler.is_compiling() and _thread.questions is not None:
        _thread.questions.append(Question(op, gpu, dtype, directions, options, sizes))
    for direction in directions:
        verdict = "not measured"
        for bounds, said in _rows(op, gpu, dtype, direction, options):
            if _cover(bounds, sizes):
                verdict = said
                break
        if verdict is not None:
            return verdict
    return None


def any_of(op: str, gpu: str) -> bool:
    """Whether anything of the op was measured on this GPU to be right and no slower."""
    good = (key for key, rows in _loaded().items() if any(said is None for _, said in rows))
    return (op, gpu) in {key[:2] for key in good}


@contextmanager
def listening() -> Iterator[list[Question]]:
    """What this thread asks in the ``with`` block: a call's question is answered by rows of its fields."""
    outer, questions = _thread.questions, []
    _thread.questions = questions
    try:
        yield questions
    finally:
        _thread.questions = outer


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


def _parsed(row: dict[str, Any]) -> tuple[Key, tuple[Bounds, str | None]]:
    key = tuple(str(row[name]) for name in KEY)
    bounds = []
    for name, bound in row.items():
        if name not in NOTES and name not in KEY:
            low, high = bound if isinstance(bound, list) else (bound, bound)
            bounds.append((name, int(low), None if high is None else int(high)))
    ratio = float(row["ratio"])
    if row["ok"] is not True:
        return key, (tuple(bounds), "measured to miss the parity contract")
    return key, (tuple(bounds), None if ratio >= 1 else f"measured at {ratio:.2f} times torch's speed")
