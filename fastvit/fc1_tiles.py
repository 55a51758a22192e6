"""The tiles of Hopper's products with fc1's epilogues: where one was measured, the CUDA library takes it.

For every other shape it goes by the model of csrc/fc1_tiles.h. A measured tile is a row of the tables of
``measurements``, which `fastvit tune` writes:

    {"op": "fc1_tile", "gpu": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "direction": "fwd",
     "options": "forward", "columns": [3072, 3072], "depth": [768, 768], "rows": [50432, 50432],
     "tile": "128x192 pingpong", "ok": true, "ratio": 1.06, ...}

``options`` is one of ``KINDS``, the sizes are those of ``Product``, of which ``rows`` alone may be a range.
``ratio`` is the time with the model's tile divided by that with this one.
"""

import ctypes
from functools import cache
from typing import NamedTuple

from . import extension, measurements

OP = "fc1_tile"
# In the order of the library's enumeration: fc1, fc1 and QKV with the norm folded in, fc1's backward, and the
# projection with the residual.
KINDS = ("forward", "folded", "folded_linear", "backward", "residual")

SIZES = {"rows", "columns", "depth"}
MOST_ROWS = 2**31


class Product(NamedTuple):
    """A product [rows, columns] of one of ``KINDS``, each number a sum over ``depth``."""

    kind: str
    rows: int
    columns: int
    depth: int


@cache
def library() -> ctypes.CDLL | None:
    """The CUDA library, if it is there and holds such products."""
    path = extension.FOLDER / "_fastvit_cuda.so"
    if extension.why_no_ops("cuda") is not None or not path.is_file():
        return None
    return with_types(ctypes.CDLL(str(path)))


def with_types(loaded: ctypes.CDLL) -> ctypes.CDLL | None:
    """The library with its functions' arguments declared, or None where it has none of them."""
    if not hasattr(loaded, "fastvit_fc1_clear"):
        return None
    number, size = ctypes.c_int, ctypes.c_int64
    loaded.fastvit_fc1_tile_name.argtypes = [number, ctypes.c_char_p, number]
    loaded.fastvit_fc1_measured.argtypes = [ctypes.c_char_p, number, size, size, size, size, number]
    loaded.fastvit_fc1_chosen.argtypes = [ctypes.c_char_p, number, number, size, size, size]
    return loaded


def names() -> list[str]:
    """The tiles that the library has; none where it has no such products."""
    loaded, found, name = library(), [], ctypes.create_string_buffer(64)
    while loaded is not None and loaded.fastvit_fc1_tile_name(len(found), name, len(name)):
        found.append(name.value.decode())
    return found


def chosen(gpu: str, multiprocessors: int, product: Product) -> str:
    """The tile that the library takes for a product on a GPU of this name."""
    kind, *sizes = product
    asked = gpu.encode(), multiprocessors, KINDS.index(kind), *sizes
    return names()[library().fastvit_fc1_chosen(*asked)]


def load() -> None:
    """Hand the library what was measured, in the place of what it was told before."""
    if (loaded := library()) is None:
        return
    loaded.fastvit_fc1_clear()
    known = names()
    for row in measurements.rows_of(OP):
        # A table may be older than the library, and hold tiles that are gone.
        if row["ok"] and row.get("tile") in known and row["options"] in KINDS and row.keys() >= SIZES:
            low, high = row["rows"]
            product = Product(row["options"], low, row["columns"][0], row["depth"][0])
            _tell(row["gpu"], product, MOST_ROWS if high is None else high, row["tile"])


@cache
def load_once() -> None:
    """``load`` at the first call of all."""
    load()


def force(gpu: str, product: Product, tile: str) -> bool:
    """For measurements: until the next ``load`` this product has this tile, and every other the model's.

    Returns whether there is such a kernel.
    """
    library().fastvit_fc1_clear()
    return _tell(gpu, product, product.rows, tile)


def _tell(gpu: str, product: Product, high: int, tile: str) -> bool:
    kind, low, columns, depth = product
    sizes = low, high, columns, depth
    place = names().index(tile)
    return bool(library().fastvit_fc1_measured(gpu.encode(), KINDS.index(kind), *sizes, place))
