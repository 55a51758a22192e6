"""The tiles near a tile: one or two of its numbers changed by a step, and none that cannot be."""

import math
from itertools import chain, combinations
from typing import Any

from fastvit_kernels.attention_bwd_heads import TOKENS

Entry = dict[str, Any]

WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4, 5)
BLOCKS = (16, 32, 64, 128, 256)
FORMS = ("TAIL_FIRST", "ONE_LAUNCH")  # 1 or 0
# The resident form covers a head's keys by three chunks of at most 128.
RESIDENT_TOKENS = 384
REGISTERS = 255  # of a thread
MOST = 24


def neighbours(kernel: str, entry: Entry, head_dim: int = 64) -> list[Entry]:
    """Tiles that differ from the entry in one number, then in two, at most ``MOST``; the conditions stay."""
    changes = [{name: value} for name, values in _steps(entry).items() for value in values]
    pairs = [a | b for a, b in combinations(changes, 2) if a.keys() != b.keys()]
    # Sizes and warps go together: pairs with a block and the warps come first.
    pairs.sort(key=lambda pair: "num_warps" not in pair)
    found = []
    for change in chain(changes, pairs):
        made = entry | change
        if _can_be(kernel, made, head_dim) and made not in found and _differs(entry, change):
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
    return not ((entry | change).get("RESIDENT") and change.keys() & {"BLOCK_N", "TAIL_FIRST"})


def _can_be(kernel: str, entry: Entry, head_dim: int) -> bool:
    if entry.get("RESIDENT") and entry.get("tokens", math.inf) > RESIDENT_TOKENS:
        return False
    return _accumulators(kernel, entry, head_dim) <= REGISTERS * 32 * entry["num_warps"]


def _accumulators(kernel: str, entry: Entry, head_dim: int) -> int:
    """The float32 numbers that a program holds at once, which is the least that it has registers for."""
    if kernel == "attention_fwd":
        keys = entry["tokens"] if entry["RESIDENT"] else entry["BLOCK_N"]
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
