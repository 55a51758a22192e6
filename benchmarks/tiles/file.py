"""Writes kernels/tiles/<arch>.json."""

import json

from fastvit_kernels import tiles

from .. import files
from .neighbours import Entry


def write(arch: str, kernel: str, index: int, entry: Entry) -> None:
    """Put the entry into the architecture's file, and into the table that this process has.

    Architectures that go by this one's file get a copy first: what was measured is not said of them.
    """
    before = tiles.table(arch)
    for path in tiles.FOLDER.glob("*.json"):
        if json.loads(path.read_text()) == {"like": arch}:
            files.write(path, text(before))
    table = {name: list(rows) for name, rows in before.items()}
    table[kernel][index] = entry
    files.write(tiles.FOLDER / f"{arch}.json", text(table))
    tiles.table.cache_clear()
    tiles.tile.cache_clear()


def text(table: dict[str, list[Entry]]) -> str:
    """A table's file: a line an entry."""
    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        kernels.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(kernels) + "\n}\n"
