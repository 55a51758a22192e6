"""Whatever is done to an accelerated model, in whatever order, it goes on computing what its twin does.

FASTVIT_SEQUENCES=3000 plays as many sequences, FASTVIT_SEQUENCES=17:20 those of these numbers.
"""

import contextlib
import os
import random
import warnings
from typing import NamedTuple

import pytest
from native_calls import needs_library
from sequences import ACTIONS, Action, Both
from tiny_twins import FAMILIES, served_by

from fastvit import derived

FIRST, _, LAST = os.environ.get("FASTVIT_SEQUENCES", "300").rpartition(":")


class Sequence(NamedTuple):
    """It follows from its number. A step has its own seed: it does the same where others are left out."""

    family: str
    mode: str
    unmeasured: bool
    steps: tuple[tuple[Action, int], ...]

    @classmethod
    def of(cls, number: int) -> "Sequence":
        rng = random.Random(number)
        steps = [(rng.choice(ACTIONS), rng.getrandbits(32)) for _ in range(rng.randint(6, 12))]
        mode, unmeasured = rng.choice(("train", "inference")), rng.random() < 0.7
        return cls(rng.choice([*FAMILIES, "own"]), mode, unmeasured, tuple(steps))

    def play(self, both: Both) -> None:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.unmeasured:
                stack.enter_context(served_by("auto"))
            stack.enter_context(both.frames)
            both.compare()
            for action, seed in self.steps:
                both.done.append(action.__name__)
                action(both, random.Random(seed))

    def fault(self) -> tuple[Exception, list[str]] | None:
        """What was raised, and what was done until then."""
        both = Both(self.family, self.mode)
        try:
            self.play(both)
        except Exception as error:
            return error, both.done
        return None

    def shortened(self) -> "Sequence":
        """One that fails too, with every step that it needs for that and no other."""
        sequence, i = self, len(self.steps)
        while i:
            i = min(i, len(sequence.steps)) - 1
            shorter = sequence._replace(steps=sequence.steps[:i] + sequence.steps[i + 1 :])
            sequence = shorter if shorter.fault() else sequence
        return sequence


@needs_library()
@pytest.mark.parametrize("number", range(int(FIRST or 0), int(LAST)))
def test_a_sequence(number, threads):
    threads(1)
    derived.refresh()
    sequence = Sequence.of(number)
    fault = sequence.fault()
    if fault is None:
        return
    shorter = sequence.shortened()
    error, done = shorter.fault() or fault
    steps = "".join(f"\n    {step}" for step in done)
    serves = "every kernel that can" if sequence.unmeasured else "auto"
    pytest.fail(
        f"FASTVIT_SEQUENCES={number}:{number + 1} plays it again.\n"
        f"{sequence.family}, {sequence.mode}, {serves}:{steps}\n{type(error).__name__}: {error}",
        pytrace=False,
    )
