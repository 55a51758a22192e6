"""What became of each stage, in a file: by it the next `make gpu` goes on where the last one ended."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import files

STATUSES = ("ok", "failed", "timed out", "absent", "interrupted")


@dataclass(frozen=True)
class State:
    """What a result depends on. A commit alone does not say what was run: sources may have been edited."""

    commit: str
    sources: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Record:
    """A stage's last run. ``found`` is what it showed, "" if nothing; ``reason`` why it is not ok."""

    stage: str
    status: str
    seconds: float
    found: str
    reason: str
    state: State
    date: str


@dataclass
class Ledger:
    """The records by stage, and the file that they are in; ``problem`` says why that could not be read."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """What the file has. Results can be had again, so one that is broken is an empty one."""
        if not path.is_file():
            return cls(path)
        try:
            return cls(path, {record.stage: record for record in _records(path)})
        except (OSError, ValueError, TypeError, KeyError) as error:
            return cls(path, problem=f"{path} is no ledger ({error}): every stage runs again")

    def add(self, record: Record) -> None:
        """In the place of the stage's last one, in the file too."""
        self.records[record.stage] = record
        files.write_rows(self.path, map(asdict, self.records.values()))

    def of(self, stage: str, state: State) -> Record | None:
        """The stage's record, if it is of this state."""
        record = self.records.get(stage)
        return record if record is not None and record.state == state else None


def _records(path: Path) -> Iterator[Record]:
    for row in json.loads(path.read_text(encoding="utf-8")):
        record = Record(**row | {"state": State(**row["state"])})
        if record.status not in STATUSES:
            raise ValueError(f"unknown status {record.status!r}")
        yield record
