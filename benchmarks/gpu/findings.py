"""What a stage's programs found, from what they left."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..rows import ROOFS, Row, load

_SANITIZED = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.+)")


@dataclass(frozen=True)
class Files:
    """What a program leaves in the folder of results: its rows, what it tried, and its log."""

    folder: Path
    name: str

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def tried(self) -> Path:
        return self.rows.with_suffix(".tried")

    @property
    def logs(self) -> Path:
        return self.folder / "logs" / self.name

    @property
    def log(self) -> Path:
        return self.logs / "log"

    def begun(self) -> int:
        """How many calls it has noted that it was about to try."""
        return sum("begun" in note for note in lines(self.tried))

    def under_way(self) -> str:
        """What it was at last about to try, if that did not end."""
        notes = [note for note in lines(self.tried) if note.keys() & {"begun", "ended", "lost"}]
        return notes[-1].get("begun", "") if notes else ""


@dataclass(frozen=True)
class Finding:
    """In a few words, "" for nothing; and why that is a failure although the program ended well."""

    text: str
    fault: str = ""


def last_line(files: Files) -> Finding:
    """What a program says last."""
    lines = [line.strip() for line in _text(files.log).splitlines() if line.strip()]
    return Finding(lines[-1][:200] if lines else "")


def tests(files: Files) -> Finding:
    """How many tests ended how. A skipped one has shown nothing, so one is a failure."""
    counts = Counter(row["outcome"] for row in last(lines(files.logs / "tests.jsonl"), "test"))
    text = ", ".join(f"{number} {what}" for what, number in counts.most_common())
    if counts["skipped"]:
        return Finding(text, f"{counts['skipped']} skipped")
    return Finding(text, "" if counts["passed"] else "no test passed")


def sanitized(files: Files) -> Finding:
    """compute-sanitizer's own summary, and that the calls under it came to their end."""
    log = _text(files.log)
    summary = _SANITIZED.findall(log)
    if not summary or "calls ran" not in log:
        return Finding(summary[-1] if summary else "", "the calls did not come to their end")
    return Finding(summary[-1])


def kept_rows(files: Files) -> Finding:
    """How many rows there are, and those without a time, or wrong, among them."""
    found = measured(files.rows)
    if not found:
        return Finding("", "it kept no rows")
    not_ok = sum(not row.ok for row in found)
    return Finding(f"{len(found)} rows" + (f", {not_ok} not right or not timed" if not_ok else ""))


def measured(path: Path) -> list[Row]:
    """A file's rows without those of the machine's own roofline; none if it has none."""
    try:
        return [row for row in load(path) if row.op not in ROOFS]
    except (OSError, ValueError):
        return []


def lines(path: Path) -> list[dict]:
    """A file of a JSON object a line, as far as it was written."""
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # its writer was ended within it
            continue
    return found


def last(rows: list[dict], key: str) -> list[dict]:
    """The last row of each."""
    return list({row[key]: row for row in rows}.values())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
