"""`make aot` passes what may ship and fails the rest, each for its own reason: on kernels made for that."""

import json

import pytest
from aot_runs import aot, python

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run over all the toys, and its rows by label."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    run = aot("--arch", "sm_89", "--jobs", "1", "--json", str(file))
    assert run.returncode == 1, run.stdout + run.stderr
    return run, {row["label"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.parametrize(
    ("label", "verdict"),
    [
        ("half small", "ok"),
        ("half dotless", "ok"),
        ("tf32 small", "ok"),
        ("ieee small", "reported"),
        ("ieee cramped", "reported"),
    ],
)
def test_passes(done, label, verdict):
    row = done[1][label]
    assert (row["verdict"], row["faults"]) == (verdict, [])


@pytest.mark.parametrize(
    ("label", "reasons"),
    [
        ("half large", ["shared memory: 163840 bytes of 101376", "spills"]),
        ("half cramped", ["spills"]),
        ("tf32 exact", ["no tensor-core instruction"]),
        ("ieee rounded", ["not exact"]),
        ("ieee double", ["float64 leaked in"]),
        ("half broken", ["does not compile: CompilationError: NameError('undefined is not defined')"]),
        ("half crash", ["the compiler crashed"]),
        ("fp16 unknown", ["its label begins with 'fp16'"]),
    ],
)
def test_fails_for_the_right_reason(done, label, reasons):
    run, rows = done
    faults = rows[label]["faults"]
    assert rows[label]["verdict"] == "FAILED"
    assert all(fault.startswith(reason) for fault, reason in zip(faults, reasons, strict=True)), faults
    (line,) = (line for line in run.stdout.splitlines() if f"({label})" in line)
    assert line == f"FAILED sm_89 {rows[label]['kernel']} ({label}): {'; '.join(faults)}"


def test_facts_are_those_of_the_compile(done):
    small, dotless = done[1]["half small"], done[1]["half dotless"]
    assert small["mma"] > 0 and small["registers"] > 0 and small["spilled"] == 0
    assert 0 < small["shared"] < small["shared_limit"] == 101376
    assert dotless["mma"] == 0
    assert done[1]["ieee cramped"]["spilled"] > 0


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """Two runs over the toys that use sm_90's asynchronous products: compiled, then from the cache."""
    folder = tmp_path_factory.mktemp("hopper")
    command = ("--arch", "sm_90", "--kernel", "attend", "--jobs", "1", "--cache", str(folder))
    runs = [aot(*command, "--json", str(folder / f"{time}.json")) for time in ("first", "second")]
    assert [run.returncode for run in runs] == [1, 1], runs
    assert len(list(folder.rglob("attend.cubin"))) == 2
    return [
        {row["label"]: row for row in json.loads((folder / f"{time}.json").read_text())["rows"]}
        for time in ("first", "second")
    ]


@pytest.mark.parametrize("time", [0, 1])
def test_products_that_ptxas_serialises_fail(hopper, time):
    in_flight, serialized = hopper[time]["half in flight"], hopper[time]["half serialised"]
    assert in_flight["verdict"] == "ok" and in_flight["hgmma"] > 3 * in_flight["waits"] > 0
    assert serialized["hgmma"] == serialized["waits"] > 0
    (fault,) = serialized["faults"]
    assert fault.startswith("serialised: (C7515) Potential Performance Loss: wgmma.mma_async")


PTXAS = "import triton; print(triton.knobs.nvidia.ptxas.path)"


def test_a_ptxas_that_says_something_new_fails(tmp_path):
    new = tmp_path / "ptxas"
    real = python("-c", PTXAS).stdout.strip()
    new.write_text(f"#!/bin/sh\necho 'ptxas warning : the moon is full' >&2\nexec {real} \"$@\"\n")
    new.chmod(0o755)
    run = aot("--arch", "sm_89", "--kernel", "add_", TRITON_PTXAS_PATH=str(new))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "ptxas says what is not understood: ptxas warning : the moon is full" in run.stdout


def test_summary_counts(done):
    run, rows = done
    assert run.stdout.splitlines()[-1].startswith(f"{len(rows)} kernels, 8 failed, Triton ")


def test_a_pass_exits_with_0_and_keeps_its_cache(tmp_path):
    run = aot("--arch", "safe", "--arch", "sm_100", "--kernel", "add_", "--cache", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("2 kernels, 0 failed, Triton ")
    assert list(tmp_path.rglob("add_rows.cubin"))


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (("--kernel", "nothing"), {}, "no kernel's name contains nothing"),
        (("--module", "not_there"), {}, "No module named 'not_there'"),
        (("--module", "op_inputs"), {}, "op_inputs has no aot_launches"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(options, variables, message):
    run = aot(*options, **variables)
    assert run.returncode == 2
    assert run.stderr.startswith(f"aot: {message}") and run.stderr.count("\n") == 1


# A driver that names an architecture is all that Triton needs to compile a call without running it.
SAME = """
import sys
from types import SimpleNamespace
import triton
from triton.backends.compiler import GPUTarget
from aot_toys import product
from fastvit_kernels.aot_compile import compile_launch

target = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0))
launch = product(64, 64, 32)
options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
called = launch.kernel.warmup(**launch.args, **launch.constants, **options, grid=(1,))
print(called.hash == compile_launch(launch, 90)[0].hash != compile_launch(launch, 80)[0].hash)
"""


def test_compiles_what_a_call_compiles(tmp_path):
    done = python("-c", SAME, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "True\n", done.stderr
