"""What a process died of is known to the next: by real processes that die, hang and lose their context."""

import math
import subprocess
import sys

import pytest
import torch

from fastvit_benchmarks.attempts import COMPILING, LOST, SECONDS, Attempts, patience

HEAD = """
import os, sys, time
from pathlib import Path
import torch
from fastvit_benchmarks.attempts import Attempts
attempts = Attempts(Path(sys.argv[1]))
with attempts("well"):
    pass
try:
    with attempts("raises"):
        raise RuntimeError
except RuntimeError:
    pass
"""
LOSE = """
def synchronize():
    raise RuntimeError("CUDA error: an illegal memory access\\nand more")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
"""


@pytest.fixture
def dies(tmp_path):
    """Runs a program that dies of "bad"; the next process's attempts, how it ended, and what it said."""

    def run(program, file="rows.tried"):
        command = [sys.executable, "-c", HEAD + program, str(tmp_path / file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        attempts = Attempts(tmp_path / file)
        assert attempts.ended("well")
        assert attempts.ended("raises")
        assert not attempts.ended("bad")
        assert attempts.died("well") is attempts.died("raises") is attempts.died("never begun") is None
        return attempts, done

    return run


def test_a_process_that_dies(dies):
    attempts, done = dies('with attempts("bad"): os._exit(9)')
    assert done.returncode == 9
    assert attempts.died("bad") == "its process died"


def test_one_that_hangs_is_ended(dies):
    attempts, done = dies('with attempts("bad", 0.2): time.sleep(30)')
    assert done.returncode == 1
    assert attempts.died("bad") == "its process was ended by the watchdog"


def test_how_long_is_read_when_a_call_begins(dies):
    """So that a rehearsal can be less patient than a GPU's measurements."""
    attempts, done = dies(
        "import math\n"
        "import fastvit_benchmarks.attempts as module\n"
        "module.SECONDS = 0.2\n"
        'with attempts("waited for", math.inf): time.sleep(0.6)\n'
        'with attempts("bad"): time.sleep(30)'
    )
    assert attempts.ended("waited for")
    assert done.returncode == 1
    assert attempts.died("bad") == "its process was ended by the watchdog"


def test_signs_of_life_put_the_watchdog_off(dies):
    attempts, done = dies(
        'with attempts("slow", 0.4):\n'
        "    for _ in range(6):\n"
        "        time.sleep(0.1)\n"
        "        attempts.alive()\n"
        "time.sleep(0.5)  # nothing is watched between attempts\n"
        'with attempts("bad"): os._exit(9)'
    )
    assert attempts.ended("slow")
    assert done.returncode == 9


def test_one_that_is_asked_to_end_has_not_died(dies):
    attempts, done = dies(
        "try:\n"
        '    with attempts("asked"): os.kill(os.getpid(), 15)\n'
        "except KeyboardInterrupt: pass\n"
        'with attempts("bad"): os._exit(9)'
    )
    assert attempts.ended("asked")
    assert done.returncode == 9


def test_a_lost_context_ends_the_process_and_says_why(dies):
    attempts, done = dies(LOSE + 'with attempts("bad"): pass\nprint("went on")')
    assert done.returncode == LOST
    said = "its process lost the CUDA context: CUDA error: an illegal memory access"
    assert done.stdout == f"bad: {said}\n"
    assert attempts.died("bad") == said


def test_a_context_that_was_lost_by_what_raised_is_seen_too(dies):
    attempts, done = dies(LOSE + 'with attempts("bad"): raise ValueError')
    assert done.returncode == LOST
    assert "Traceback" not in done.stderr
    assert attempts.died("bad")


def test_the_last_note_counts_and_a_torn_line_is_none(tmp_path):
    file = tmp_path / "rows.tried"
    file.write_text('{"begun": "a"}\n{"begun": "b"}\n{"ended": "b"}\n{"ended": "a')
    attempts = Attempts(file)
    assert attempts.died("a")
    assert attempts.ended("b")
    with attempts("a"):
        assert attempts.died("a")  # of an earlier process; this one's own does not count yet
    with attempts("c"):
        assert not attempts.died("c")
    again = Attempts(file)
    assert again.ended("a")
    assert again.ended("c")


def test_without_a_file_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: 1 / 0)
    with Attempts()("a"):
        pass


def test_who_is_watched():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (patience("fastvit triton", gpu), patience("fastvit compiled", gpu)) == (SECONDS, COMPILING)
    assert patience("timm compiled, max-autotune", gpu) == patience("fastvit triton", cpu) == math.inf
