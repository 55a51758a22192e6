"""Whatever is done to an accelerated model, in whatever order, it goes on computing what its twin does.

FASTVIT_SEQUENCES=3000 plays as many sequences, FASTVIT_SEQUENCES=17:20 those of these numbers.
"""

import os

import pytest
from native_calls import needs_library
from sequences import Sequence

from fastvit import derived

FIRST, _, LAST = os.environ.get("FASTVIT_SEQUENCES", "300").rpartition(":")


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
