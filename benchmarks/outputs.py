"""Where a benchmark's rows go: files as the rows come, a picture and a comparison when it ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import columns, regression
from .attempts import Attempts
from .harness import Row, load, machine, save
from .rows import OURS

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


@dataclass
class Outputs:
    """Files, each of which is optional, and the rows so far.

    Args:
        json, csv, png: where the rows, a table of them and a picture go.
        baseline: rows of an earlier run, which ours are compared with.
        slower: by which part of the baseline's time they may be slower; None only shows it.
        resume: go on with the rows of ``json``; beside it, as .tried, is what was begun.

    Raises:
        ValueError, OSError: if earlier rows cannot be read, or were measured on another machine.
    """

    json: Path | None = None
    csv: Path | None = None
    png: Path | None = None
    baseline: Path | None = None
    slower: float | None = None
    resume: bool = False
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What would fail after an hour fails now."""
        self.before = load(self.baseline) if self.baseline else []
        if self.before:
            regression.check_machine(self.before, machine(), str(self.baseline))
        for path in filter(None, (self.json, self.csv, self.png)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise ValueError(f"{path} is a folder: name a file")
        if self.resume and self.json is None:
            raise ValueError("--resume needs --json FILE: the rows of the run that is to go on")
        tried = self.json and self.json.with_suffix(".tried")
        if self.resume and self.json.exists():
            self.rows = load(self.json)
            regression.check_machine(self.rows, machine(), str(self.json))
        elif tried is not None:
            tried.unlink(missing_ok=True)
        self.attempts = Attempts(tried)

    def lacking(self, calls: Sequence[tuple], providers: Iterable[str]) -> list[str]:
        """Those that the rows lack a call of, behind the first, which is their baseline if it is not ours."""
        providers, known = list(providers), {(row.call, row.provider) for row in self.rows}
        found = [name for name in providers if not all((call, name) in known for call in calls)]
        first = [name for name in providers[:1] if not name.startswith(OURS)]
        return list(dict.fromkeys(first + found)) if found else []

    def keep(self, rows: Iterable[Row]) -> None:
        """Add rows, in the files too; one of a call and provider that was there takes the place of that."""
        self.rows = list({(row.call, row.provider): row for row in [*self.rows, *rows]}.values())
        if self.json is not None:
            save(self.rows, self.json)
        if self.csv is not None:
            columns.save_csv(self.rows, self.csv)

    def finish(self, console: Console, *, stopped: bool = False) -> int:
        """Draw, compare and say what there is.

        Returns:
            The exit status: 1 if one of ours became slower than is allowed, 130 after Ctrl-C, else 0.
        """
        if self.png is not None and self.rows:
            from .picture import draw  # matplotlib takes a second to load

            draw(self.rows, self.png)
        changes = regression.changes(self.rows, self.before)
        if changes:
            console.print(regression.table(changes, self.slower))
        verdicts = [row.verdict for row in self.rows]
        wrong, lost = verdicts.count("wrong"), verdicts.count("not run")
        kept = [str(path) for path in (self.json, self.csv, self.png) if path is not None and self.rows]
        text = f"{len(self.rows)} rows, {wrong} wrong" + (f", {lost} not run" if lost else "")
        text += f"; kept in {', '.join(kept)}" if kept else ""
        text = escape(f"stopped: {text}" if stopped else text)
        console.print(f"[red]{text}[/red]" if wrong else text)
        if stopped:
            return INTERRUPTED
        return int(self.slower is not None and any(change.is_slower(self.slower) for change in changes))
