"""Tile tables, one JSON file an architecture: what each kernel is launched with, decided before run time.

A file maps a kernel's name to entries in order; the first that fits is taken:

    {"dtype": "half", "head_dim": 64, "tokens": 272, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2,
     "status": "modelled"}

Lower-case names are conditions: ``dtype`` is "half" (float16, bfloat16), "tf32" or "ieee" (float32), and a
number is the largest size that the entry is for. Capitals are the kernel's constants; RESIDENT is 0, or how
many programs that keep a head's keys a multiprocessor holds. ``status`` is
"measured" (with "gpu", "date" and "commit") or "modelled": chosen from the register and shared-memory facts
of a compile. A file of {"like": "sm_89"} is that one's table. An architecture without a file of its own, and
the CPU's interpreter, take ``safe.json``.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import launch_cache

FOLDER = Path(__file__).parent / "tiles"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# Programs that make a GPU of each kind busy: its multiprocessors, of the smallest product that is common.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
_LAUNCH = ("num_warps", "num_stages")
_NOTES = ("status", "gpu", "date", "commit")


@dataclass(frozen=True)
class Tile:
    """A kernel's constants, its warps and pipeline stages, and whether that was measured or modelled."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int
    status: str


@cache
def tile(kernel: str, arch: str, dtype: str, **sizes: int) -> Tile:
    """The first entry of the architecture's table that fits.

    Args:
        kernel: its name in the tables, "attention_fwd" say.
        arch: "sm_90" say; any name that has no table takes the safe one.
        dtype: "half", "tf32" or "ieee".
        sizes: what the entries bound: head_dim, tokens, ...

    Raises:
        LookupError: if no entry fits.
    """
    return _tile(table(arch)[kernel][place(kernel, arch, dtype, **sizes)])


def place(kernel: str, arch: str, dtype: str, **sizes: int) -> int:
    """Where in the kernel's list the first entry is that fits. Arguments and errors are ``tile``'s."""
    for index, entry in enumerate(table(arch)[kernel]):
        if entry.get("dtype", dtype) == dtype and all(
            size <= entry.get(name, size) for name, size in sizes.items()
        ):
            return index
    raise LookupError(f"no tile for {kernel} on {arch} in {dtype} with {sizes}")


@contextmanager
def overriding(kernel: str, arch: str, index: int, entry: dict[str, Any]) -> Iterator[None]:
    """For whoever measures tiles: inside the ``with`` block this entry stands at that place of the table."""
    rows = table(arch)[kernel]
    before, rows[index] = rows[index], entry
    _forget()
    try:
        yield
    finally:
        rows[index] = before
        _forget()


def _forget() -> None:
    tile.cache_clear()
    launch_cache.forget()


@cache
def table(arch: str) -> dict[str, list[dict[str, Any]]]:
    """The table of an architecture, as its file has it: entries by kernel."""
    entries = json.loads((FOLDER / f"{arch if arch in ARCHITECTURES else 'safe'}.json").read_text())
    return table(entries["like"]) if "like" in entries else entries


def dtype_class(dtype: torch.dtype, precision: str = "ieee") -> str:
    """ "half" for float16 and bfloat16, else how float32 is multiplied: "ieee" or "tf32"."""
    return precision if dtype == torch.float32 else "half"


def _tile(entry: dict[str, Any]) -> Tile:
    constants = {name: value for name, value in entry.items() if name.isupper()}
    return Tile(constants, entry["num_warps"], entry["num_stages"], entry["status"])
