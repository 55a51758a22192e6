"""Files that are whole whenever a program is ended."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Put the text there in one step: the old file, or the new one, and never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON list with a row a line, so that a diff reads well."""
    lines = ",\n".join(map(json.dumps, rows))
    write(path, f"[\n{lines}\n]\n" if lines else "[]\n")
