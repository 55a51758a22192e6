"""Measure this GPU's tiles: `python -m fastvit_benchmarks.tiles.tune_tiles [--seconds 150] [--tried FILE]`.

For each entry of kernels/tiles/<arch>.json, the most important first, the tiles near it are compiled, judged
by the contract and timed beside it on the calls that it serves. The best takes its place if a second
measurement finds it faster too. Each entry is written when it is done, so a run that is ended leaves a whole
table; the next one begins with the entries that were not measured at its commit, without one that a run died
of.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer

from fastvit_kernels import tiles
from fastvit_kernels.launch import arch_of

from ..attempts import Attempts
from ..harness import machine
from .calls import TileCall, calls
from .file import write
from .neighbours import Entry, neighbours

GAIN = 1.02  # two measurements of one tile differ by less
ROUNDS = 40  # of the second measurement
SILENT = 90  # seconds without an answer, of which a compilation is one, after which a tile hangs


class Tried(Protocol):
    """See ``tile_trials.Trials``."""

    def compile(self, kernel: str, index: int, entries: Sequence[Entry], calls: Sequence) -> list[str]: ...
    def ships(self, kernel: str, index: int, entry: Entry) -> str: ...
    def speeds(
        self, kernel: str, index: int, entries: Sequence[Entry], calls: Sequence, rounds: int = ...
    ) -> list[float | None]: ...


@dataclass(frozen=True)
class Served:
    """An entry, by its place in its kernel's list, and the calls that it is chosen for."""

    kernel: str
    index: int
    calls: tuple[TileCall, ...]


def served(arch: str, known: Sequence[TileCall], commit: str) -> list[Served]:
    """The entries that a call is served by, in the order of the calls; those measured at this commit last."""
    groups: dict[tuple[str, int], list[TileCall]] = {}
    for call in known:
        groups.setdefault((call.kernel, call.place(arch)), []).append(call)
    found = [Served(*key, tuple(own)) for key, own in groups.items()]
    return sorted(found, key=lambda s: tiles.table(arch)[s.kernel][s.index].get("commit") == commit)


def better(entry: Served, current: Entry, trials: Tried) -> tuple[Entry, float] | str:
    """A right tile that is faster in two measurements, and its speed; or why there is none."""
    kernel, index, own = entry.kernel, entry.index, entry.calls
    near = neighbours(kernel, current, max(call.sizes.get("head_dim", 0) for call in own))
    compiled = zip(near, trials.compile(kernel, index, near, own), strict=True)
    right = [tile for tile, fault in compiled if not fault]
    if not right:
        return "no tile near it compiles"
    first, *speeds = trials.speeds(kernel, index, [current, *right], own)
    if first is None:
        return "WRONG: it does not run, or misses the contract"
    ranked = sorted(zip(speeds, right, strict=True), key=lambda pair: -(pair[0] or 0))
    for speed, tile in ranked:
        if speed is None or speed < GAIN:
            break
        if trials.ships(kernel, index, tile):
            continue  # right here, and not beside the options that these calls lack
        _, again = trials.speeds(kernel, index, [current, tile], own, rounds=ROUNDS)
        if again is not None and again >= GAIN:
            return tile, again
        break
    return f"no faster one among {len(right)}"


def tune(
    arch: str,
    known: Sequence[TileCall],
    trials: Tried,
    notes: dict[str, str],
    attempts: Attempts,
    *,
    deadline: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int]:
    """Measure entry by entry until the time is over, and write each.

    Args:
        notes: what a measured entry says beside its numbers: gpu, date and commit.

    Returns:
        How many were measured, and how many changed.
    """
    measured = changed = 0
    for entry in served(arch, known, notes["commit"]):
        if clock() >= deadline:
            break
        current = tiles.table(arch)[entry.kernel][entry.index]
        named = f"{entry.kernel} {entry.index}"
        attempt = f"{named} at {notes['commit']}"
        if reason := attempts.died(attempt):
            say(f"{named}: {reason}")
            continue
        with attempts(attempt, SILENT):
            found = better(entry, current, trials)
        if isinstance(found, str):
            say(f"{named}: {found}")
            if found.startswith("WRONG"):
                continue
            tile = current
        else:
            tile, speed = found
            changes = {name: (current[name], tile[name]) for name in tile if tile[name] != current[name]}
            said = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
            say(f"{named}: {speed:.2f}x by {said}")
            changed += 1
        measured += 1
        write(arch, entry.kernel, entry.index, tile | {"status": "measured"} | notes)
    return measured, changed


def main(
    seconds: Annotated[float, typer.Option(min=1, help="When to begin no other entry.")] = 150,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = os.cpu_count() or 1,
    tried: Annotated[Path | None, typer.Option(help="Where it is noted what a run may die of.")] = None,
) -> None:
    """Tune the tiles on this machine's GPU."""
    from .trials import Trials

    deadline = time.monotonic() + seconds
    here = machine()
    if here.gpu is None:
        sys.exit("tune_tiles: torch finds no CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_of(device)
    if arch not in tiles.ARCHITECTURES:
        sys.exit(f"tune_tiles: {arch} has no table of its own, and the safe one is for every GPU")
    commit = (here.commit or "").removesuffix("-dirty")
    if not commit:
        sys.exit("tune_tiles: a measured tile names its commit, and there is none: set FASTVIT_COMMIT")
    notes = {"gpu": here.gpu, "date": date.today().isoformat(), "commit": commit}
    attempts = Attempts(tried)
    trials = Trials(arch, device, workers, attempts.alive)
    measured, changed = tune(arch, list(calls()), trials, notes, attempts, deadline=deadline, say=print)
    print(f"{measured} tiles measured, {changed} changed, in {Path('kernels', 'tiles', f'{arch}.json')}")


if __name__ == "__main__":
    typer.run(main)
