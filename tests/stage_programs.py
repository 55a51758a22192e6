"""Stages of `make gpu` that are small programs, on a machine that is made up."""

import io
import sys
import time
from pathlib import Path

from fastvit_benchmarks.gpu import findings, stage_runner
from fastvit_benchmarks.gpu.ledger import State
from fastvit_benchmarks.gpu.preflight import Facts
from fastvit_benchmarks.gpu.stage_runner import Absent, Command, Stage
from fastvit_benchmarks.harness import Row, Timing, machine

STATE = State("abc1234", "5eed", {"torch": "2.14.1"})
FACTS = Facts(
    gpu="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    gpus=1,
    free=79.0,
    total=80.0,
    library=None,
    nvcc="nvcc",
    sanitizer="compute-sanitizer",
    cutlass=True,
    packages=frozenset({"timm", "xdist"}),
    state=STATE,
)


def python(code, name="it", **how):
    return Command(name, (sys.executable, "-S", "-c", code), **how)


def stage(name, *codes, limit=20.0, gate=False, read=findings.last_line):
    commands = [python(code, f"{name}{i or ''}", read=read) for i, code in enumerate(codes)]
    return Stage(name, limit, lambda facts: commands, gate)


def absent(name, gate=False):
    def commands(facts):
        raise Absent("the tool is not here")

    return Stage(name, 20.0, commands, gate)


def one(code, **how):
    """What a single stage of this program comes to."""
    return lambda tmp_path: stage_runner.run(stage("it", code, **how), FACTS, 20, tmp_path, io.StringIO())


def rows(*found, op="vit_base_patch16_224", direction="fwd"):
    facts = {"op": op, "dtype": "bfloat16", "shape": (3, 224, 224), "direction": direction}
    made = []
    for provider, batch, ms in found:
        timing = None if ms is None else Timing((ms,))
        own = {"provider": provider, "batch": batch, "ok": ms is not None}
        made.append(Row.of(timing, machine(), **facts | own))
    return made


# A child and a grandchild, both deaf to SIGTERM.
HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", code])
open({file!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("hanging", flush=True)
{then}
"""


def dead(pid):
    """Gone, or a zombie that its new parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
