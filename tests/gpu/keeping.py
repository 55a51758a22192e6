"""What `--keep FOLDER` keeps of a run, as it comes: a run that is cut off has left all that it found.

tests.jsonl       a line a test, when it has ended
checks.PID.jsonl  a line for each verdict of the contract, by the process that asked for it
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict
from functools import wraps
from pathlib import Path

import pytest

WORDS = 1500  # of a failure, the last


def name_of(nodeid: str) -> str:
    """Of a test below this folder, without the group that xdist appends."""
    return nodeid.rpartition("tests/gpu/")[2].partition("@")[0]


class Outcomes:
    """For the process that hears of every test, also of those whose process died."""

    def __init__(self, folder: Path) -> None:
        self.file = open(folder / "tests.jsonl", "a", buffering=1)  # noqa: SIM115
        self.phases: dict[str, list[pytest.TestReport]] = defaultdict(list)
        self.broken: set[str] = set()

    def pytest_runtest_logreport(self, report):
        self.phases[report.nodeid].append(report)
        if report.when in ("setup", "call"):
            return
        phases = self.phases.pop(report.nodeid)
        # The first that failed, or else was skipped; all of them passed, or else any.
        worst = min(phases, key=lambda phase: ("failed", "skipped", "passed").index(phase.outcome))
        row = {"test": name_of(report.nodeid), "outcome": worst.outcome}
        row["seconds"] = round(sum(phase.duration for phase in phases), 2)
        if not worst.passed:
            row["why"] = worst.longreprtext[-WORDS:]
        if facts := dict(fact for phase in phases for fact in phase.user_properties):
            row["facts"] = facts
        self.file.write(json.dumps(row) + "\n")

    def pytest_collectreport(self, report):
        """A file that cannot be imported: every process says so, and one is heard."""
        if report.failed and report.nodeid not in self.broken:
            self.broken.add(report.nodeid)
            row = {"test": name_of(report.nodeid), "outcome": "failed", "seconds": 0.0}
            self.file.write(json.dumps(row | {"why": report.longreprtext[-WORDS:]}) + "\n")


def keep_verdicts(folder: Path) -> None:
    """Before the tests import the contract's functions by their names."""
    from fastvit import contract

    path = folder / f"checks.{os.getpid()}.jsonl"

    def kept(judging):
        @wraps(judging)
        def judged(*args, **how):
            check = judging(*args, **how)
            test = name_of(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0])
            numbers = {name: value for name, value in asdict(check).items() if value == value}  # no NaN
            with open(path, "a") as file:
                file.write(json.dumps({"test": test} | numbers) + "\n")
            return check

        return judged

    for name in ("judge", "judge_saved", "judge_top1"):
        setattr(contract, name, kept(getattr(contract, name)))
