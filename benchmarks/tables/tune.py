"""Measure the kernels at a model's own shapes: what `fastvit tune` does, and the rows that it keeps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import nn

from fastvit import measurements
from fastvit.backends import TABLE, Backend
from fastvit.fake_run import run_without_data
from fastvit.recording import recording

from ..harness import Machine, machine
from ..op_bench import differentiated, run_case
from ..recorded import Recorded


@dataclass(frozen=True)
class Candidate:
    """A kernel that can run a call, and the question that `auto` asks the table before it takes it."""

    case: Recorded
    backend: str
    question: measurements.Question

    @property
    def row(self) -> dict[str, Any]:
        """The table's row for it, without what is measured."""
        asked = self.question
        facts = {"op": asked.op, "gpu": asked.gpu, "dtype": asked.dtype, "direction": self.case.direction}
        return facts | {"options": asked.options} | {size: [n, n] for size, n in asked.sizes.items()}


def candidates(model: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool) -> list[Candidate]:
    """One for each op, kind of arguments and direction of the model's call that a kernel can run here."""
    found = {}
    for gradients in (False, True) if training else (False,):
        calls: list = []
        with recording(calls):
            run_without_data(model, args, kwargs, None, gradients)
        for op, given, named in calls:
            with torch.set_grad_enabled(gradients):
                for candidate in _of_call(op, given, named, "bwd" if gradients else "fwd"):
                    found[candidate.case] = candidate
    return list(found.values())


def _of_call(op: str, args: tuple, kwargs: dict[str, Any], direction: str) -> Iterator[Candidate]:
    for row in TABLE[op]:
        if row.name != "reference" and row.can_run(*args, **kwargs) is None:
            question = _question(row, args, kwargs)
            if question is not None:
                case = Recorded.of(op, args, kwargs, direction, question.dtype)
                if direction == "fwd" or case.trained:
                    yield Candidate(case, row.name, question)
            return


def _question(row: Backend, args: tuple, kwargs: dict[str, Any]) -> measurements.Question | None:
    with measurements.listening() as questions:
        row.worth(*args, **kwargs)
    return questions[0] if questions else None


def measure(found: list[Candidate], device: torch.device, on_step: Callable[[str], None]) -> list[dict]:
    """The candidates' rows with parity, speed and when and where they were measured."""
    here, rows = machine(), []
    for candidate in found:
        case = candidate.case
        on_step(case.title)
        providers = {
            "torch": differentiated(case.reference),
            "ours": differentiated(case.on(candidate.backend)),
        }
        outcome = run_case(case, providers, device, here, rounds=20, seconds=0.2)
        ok = bool(outcome.checks.get("ours")) and all(check.ok for check in outcome.checks["ours"])
        ratio, graphed = outcome.ratios("ours")
        speeds = {"ratio": round(ratio, 3)} | ({} if graphed is None else {"graphed": round(graphed, 3)})
        rows.append(candidate.row | {"ok": ok} | speeds | notes(here))
    return rows


def notes(here: Machine) -> dict[str, str]:
    """When and where a row was measured."""
    facts = {"torch": torch.__version__, "triton": here.triton or "", "date": date.today().isoformat()}
    return facts | {"commit": here.commit or ""}
