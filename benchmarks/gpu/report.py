"""What `make gpu` ends with, a page: stages, failures by cause, errors over torch's, times beside torch's."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..rows import OURS
from . import findings
from .runner import Outcome, Stage

STYLES = {"ok": "green", "absent": "dim", "not reached": "yellow", "timed out": "yellow"}
CAUSES = 30  # as many as a page has room for


def page(wanted: Sequence[Stage], outcomes: Mapping[str, Outcome], folder: Path) -> Group:
    """All of it, from what the stages left in the folder of results."""
    parts = []
    for title, found in (
        ("Milliseconds, and speed beside the first", times(folder)),
        ("Largest error over torch's own", errors(folder)),
        ("Failures by cause", failures(folder)),
    ):
        if text := list(found):
            parts += [Text(f"\n{title}", "bold"), *(Text(f"  {line}") for line in text)]
    parts.append(summary(wanted, outcomes))  # last, which is where the eye is
    return Group(*parts)


def summary(wanted: Sequence[Stage], outcomes: Mapping[str, Outcome]) -> Table:
    """A line for each stage, what did not fit into the time included."""
    table = Table("stage", "status", "time", "found", box=SIMPLE, pad_edge=False)
    table.columns[2].justify = "right"
    for stage in wanted:
        outcome = outcomes.get(stage.name)
        status = outcome.status if outcome else "not reached"
        said = [] if outcome is None else [part for part in (outcome.found, outcome.reason) if part]
        seconds = f"{outcome.seconds:.0f} s" if outcome else "-"
        table.add_row(stage.name, Text(status, STYLES.get(status, "red")), seconds, Text(": ".join(said)))
    return table


def failures(folder: Path) -> Iterator[str]:
    """How many tests of a file failed of the same, and one of them."""
    causes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(folder.glob("logs/*/tests.jsonl")):
        for row in findings.last(findings.lines(path), "test"):
            if row["outcome"] == "failed":
                said = row.get("why", "").splitlines() or ["?"]
                cause = next((line[1:].strip() for line in said if line.startswith("E ")), said[-1])
                file, _, name = row["test"].partition("::")
                causes[Path(file).name, cause.partition("[")[0][:120]].append(name)
    ranked = sorted(causes.items(), key=lambda item: -len(item[1]))
    for (file, cause), names in ranked[:CAUSES]:
        yield f"{len(names)}x {file}: {cause} | {names[0][:90]}"
    if ranked[CAUSES:]:
        yield f"and {len(ranked) - CAUSES} causes more"


def errors(folder: Path) -> Iterator[str]:
    """By dtype and kind, of each name the largest error (rms) as a multiple of that of torch's own op."""
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for path in sorted(folder.glob("logs/*/checks.*.jsonl")):
        for row in findings.lines(path):
            if row.get("b_rms"):
                of_kind = worst[row["dtype"], row["kind"]]
                of_kind[row["name"]] = max(of_kind[row["name"]], row["e_rms"] / row["b_rms"])
    for (dtype, kind), found in sorted(worst.items()):
        ranked = sorted(found.items(), key=lambda item: -item[1])
        yield f"{dtype} {kind}: {', '.join(f'{name} {error:.2f}' for name, error in ranked[:12])}"


def times(folder: Path) -> Iterator[str]:
    """A line a call: each provider's time, and how many times as fast as the first it is."""
    for row in findings.lines(folder / "logs" / "smoke" / "tests.jsonl"):
        if (facts := row.get("facts")) and facts.get("ms"):
            speed = facts["torch_ms"] / facts["ms"]
            name = row["test"].partition("[")[2].rstrip("]")
            said = f"torch {facts['torch_ms']:.4g}, ours {facts['ms']:.4g} {speed:.2f}x"
            yield f"smoke, beside other processes: {name}: {said}"
    for path in sorted(folder.glob("*.json")):
        calls = defaultdict(list)
        for row in findings.measured(path):
            calls[row.call].append(row)
        for (op, direction, dtype, shape, batch), rows in calls.items():
            said = []
            # Ours right behind the first: a line has its end.
            for row in sorted(rows, key=lambda row: row is not rows[0] and not row.provider.startswith(OURS)):
                speed = f" {row.speed:.2f}x" if row.speed and row is not rows[0] else ""
                time = f"{row.ms_p50:.4g}" if row.ms_p50 else "-"
                if row.eager_ms_p50:
                    speed += f" (eager {row.eager_ms_p50:.4g}"
                    speed += f" {row.eager_speed:.2f}x)" if row.eager_speed and row is not rows[0] else ")"
                mark = "" if row.ok else f" ({(row.reason or row.verdict)[:40]})"
                said.append(f"{row.provider} {time}{speed}{mark}")
            sizes = "x".join(map(str, shape))
            yield f"{path.stem}: {op} {direction} {dtype} {sizes} batch {batch}: {', '.join(said)}"[:400]
