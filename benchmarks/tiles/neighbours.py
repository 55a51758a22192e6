"""The tiles to try in the place of one: those known to be good elsewhere, and those that are near it."""

import math
from itertools import chain, combinations
from typing import Any

from fastvit_kernels.attention_bwd_heads import TOKENS

Entry = dict[str, Any]

WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4, 5)
BLOCKS = (16, 32, 64, 128, 256)
FORMS = ("TAIL_FIRST", "ONE_LAUNCH")  # 1 or 0
# The resident form covers a head's keys by three chunks, at most so wide, and takes one at a time.
WIDEST = 128
RESIDENT_TOKENS = 3 * WIDEST
REGISTERS = 255  # of a thread
MOST = 24


def _seed(rows: int, columns: int, warps: int, stages: int, **forms: int) -> Entry:
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages} | forms


# Tiles that compile without spills in half precision at 64 channels a head, more than two steps from most.
MOST_CHANNELS = 64
SEEDS = {
    "attention_fwd": (
        _seed(128, 64, 8, 3, RESIDENT=0),
        _seed(64, 64, 4, 2, RESIDENT=0),
        _seed(64, 64, 4, 2, RESIDENT=2),
        _seed(64, 64, 4, 1, RESIDENT=3),
    ),
    "attention_bwd_heads": (_seed(64, 128, 8, 1, ONE_LAUNCH=1),),
    "attention_bwd_keys": (_seed(64, 128, 8, 2), _seed(64, 64, 4, 1), _seed(32, 64, 4, 1)),
    "attention_bwd_queries": (_seed(128, 64, 8, 2), _seed(64, 64, 4, 2)),
}


def neighbours(kernel: str, entry: Entry, head_dim: int = 64) -> list[Entry]:
    """The seeds, then tiles that differ from the entry in one number, then in two; the conditions stay.

    At most ``MOST`` of them, for heads of ``head_dim`` channels.
    """
    changes = [{name: value} for name, values in _steps(entry).items() for value in values]
    pairs = [a | b for a, b in combinations(changes, 2) if a.keys() != b.keys()]
    # Sizes and warps go together: pairs with a block and the warps come first.
    pairs.sort(key=lambda pair: "num_warps" not in pair)
    found = []
    fits = entry.get("dtype") == "half" and entry.get("head_dim", MOST_CHANNELS + 1) <= MOST_CHANNELS
    for change in chain(SEEDS.get(kernel, ()) if fits else (), changes, pairs):
        made = entry | change
        if (
            made != entry
            and _can_be(kernel, made, head_dim)
            and made not in found
            and _differs(entry, change)
        ):
            found.append(made)
    return found[:MOST]


def _steps(entry: Entry) -> dict[str, list[int]]:
    known = {"num_warps": WARPS, "num_stages": STAGES}
    known |= {name: BLOCKS for name in entry if name.startswith("BLOCK")}
    steps = {name: _beside(values, entry[name]) for name, values in known.items()}
    if "RESIDENT" in entry:
        steps["RESIDENT"] = [0] if entry["RESIDENT"] else [2]
    steps |= {name: [1 - entry[name]] for name in FORMS if name in entry}
    return steps


def _beside(values: tuple[int, ...], value: int) -> list[int]:
    return [v for v in values if v < value][-1:] + [v for v in values if v > value][:1]


def _differs(entry: Entry, change: Entry) -> bool:
    """The resident form has no BLOCK_N and no tail: its keys are there at once.

    A backward in one launch has no loop to pipeline, and one in two has its numbers in other entries.
    """
    if "ONE_LAUNCH" in entry:
        return "ONE_LAUNCH" in change or (entry["ONE_LAUNCH"] == 1 and "num_stages" not in change)
    different = {name for name, value in change.items() if entry[name] != value}
    return not ((entry | change).get("RESIDENT") and different & {"BLOCK_N", "TAIL_FIRST"})


def _can_be(kernel: str, entry: Entry, head_dim: int) -> bool:
    if entry.get("RESIDENT") and entry.get("tokens", math.inf) > RESIDENT_TOKENS:
        return False
    return _accumulators(kernel, entry, head_dim) <= REGISTERS * 32 * entry["num_warps"]


def _accumulators(kernel: str, entry: Entry, head_dim: int) -> int:
    """The float32 numbers that a program holds at once, which is the least that it has registers for."""
    if kernel == "attention_fwd":
        keys = min(entry["tokens"], WIDEST) if entry["RESIDENT"] else entry["BLOCK_N"]
        return entry["BLOCK_M"] * (head_dim + keys)
    elif kernel == "attention_bwd_heads":
        chunk = entry["BLOCK_N"] * 2 * (head_dim + entry["BLOCK_M"])
        return entry["ONE_LAUNCH"] * (chunk + min(entry.get("tokens", TOKENS), TOKENS) * head_dim)
    elif kernel == "attention_bwd_keys":
        return entry["BLOCK_N"] * (2 * head_dim + entry["BLOCK_M"])
    elif kernel == "attention_bwd_queries":
        return entry["BLOCK_M"] * (head_dim + entry["BLOCK_N"])
    else:
        rows, columns = {
            "patch_embed_fwd": ("BLOCK_M", "BLOCK_D"),
            "patch_embed_dweight": ("BLOCK_D", "BLOCK_K"),
            "patch_embed_dimages": ("BLOCK_M", "BLOCK_K"),
        }[kernel]
        return entry[rows] * entry[columns]
