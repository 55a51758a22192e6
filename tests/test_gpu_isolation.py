"""tests/gpu on made-up machines: a bad test fails alone, all is kept, what is lacking is left out by name."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "gpu"
TOYS = {
    "torch.py": """
        from types import SimpleNamespace

        def no_wait(): pass

        cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))
        cuda.is_initialized, cuda.synchronize = lambda: True, no_wait

        def manual_seed(seed): pass

        device = str
    """,
    "fastvit/__init__.py": "",
    "fastvit/contract.py": """
        from dataclasses import dataclass

        @dataclass
        class Check:
            name: str
            e_rms: float
            b_rms: float = float("nan")
            ok: bool = True

        def judge(name, e_rms): return Check(name, e_rms, ok=e_rms < 1)

        judge_saved = judge_top1 = judge
    """,
    "test_smoke.py": """
        import os, time
        import pytest
        import torch
        from fastvit.contract import judge

        def gone(): raise RuntimeError("CUDA error: an illegal memory access")

        @pytest.mark.parametrize("case", CASES)
        def test_it(case, record_property):
            record_property("ms", 1.5)
            if "exits" in case: os._exit(3)
            if "hangs" in case: time.sleep(60)
            if "loses" in case: torch.cuda.synchronize = gone
            check = judge("out", 2.0 if "wrong" in case else 0.5)
            assert check.ok, check
    """,
}
# What fails, and a word of why. The first word of a case is its group.
BAD = {"one exits": "crashed", "two hangs": "in test_it", "two loses": "an illegal", "one is wrong": "2.0"}
GOOD = ["one is good", "two is good", "one is good too", "two is good too", "three is good", "four is good"]
CASES = [*GOOD[:2], *BAD, *GOOD[2:]]
SECONDS = 2


@pytest.fixture
def toys(tmp_path):
    """Runs pytest in a folder of toys beside what isolates and keeps; how that ended."""
    for name in ("conftest.py", "isolation.py", "keeping.py", "needs.py"):
        shutil.copy(FOLDER / name, tmp_path)
    for name, text in TOYS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines = text.replace("CASES", repr(CASES)).splitlines()
        (tmp_path / name).write_text("\n".join(line[8:] for line in lines))

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--hang", str(SECONDS), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


def kept(folder, files):
    return [json.loads(line) for path in folder.glob(files) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("dist", ["load", "loadgroup"])
def test_a_bad_test_fails_alone(dist, toys, tmp_path):
    pytest.importorskip("xdist")
    words = ("-p", "xdist.plugin", "-n", "2", "--dist", dist, "--max-worker-restart=100")
    done = toys(*words, "--keep", "kept")
    assert f"{len(BAD)} failed, {len(GOOD)} passed" in done.stdout, done.stdout
    rows = kept(tmp_path / "kept", "tests.jsonl")
    named = {row["test"].partition("[")[2][:-1]: row for row in rows}
    assert len(rows) == len(named) == len(CASES)
    assert {case for case, row in named.items() if row["outcome"] == "failed"} == set(BAD)
    for case, word in BAD.items():
        assert word in named[case]["why"], named[case]
    assert all(named[case]["facts"] == {"ms": 1.5} and "why" not in named[case] for case in GOOD)
    checks = kept(tmp_path / "kept", "checks.*.jsonl")
    assert len(checks) == len(GOOD) + 2  # and of what is wrong, and of what lost its context later
    (wrong,) = (check for check in checks if not check["ok"])
    assert wrong == {"test": "test_smoke.py::test_it[one is wrong]", "name": "out", "e_rms": 2.0, "ok": False}


def test_alone_it_ends_with_what_lost_the_context(toys, tmp_path):
    done = toys("-k", "loses or good", "--keep", "kept")
    assert done.returncode == 70
    assert "test_smoke.py::test_it[two loses] lost the CUDA context: CUDA error: an illegal" in done.stdout
    outcomes = [row["outcome"] for row in kept(tmp_path / "kept", "tests.jsonl")]
    assert outcomes == ["passed"] * (len(outcomes) - 1) + ["failed"]


def test_alone_it_ends_where_it_hangs(toys):
    done = toys("-k", "hangs")
    assert done.returncode
    assert "in test_it" in done.stderr


@pytest.mark.parametrize("words", [(), ("-p", "xdist.plugin", "-n", "2")], ids=["alone", "with others"])
def test_a_file_that_cannot_be_imported_is_told_of(words, toys, tmp_path):
    if words:
        pytest.importorskip("xdist")
    (tmp_path / "test_broken.py").write_text("import nothing_of_the_kind")
    assert toys("--keep", "kept", "-k", "good", *words).returncode
    (row,) = (row for row in kept(tmp_path / "kept", "tests.jsonl") if row["test"] == "test_broken.py")
    assert row["outcome"] == "failed"
    assert "nothing_of_the_kind" in row["why"]


MACHINE = """
import os
from types import SimpleNamespace as Facts
import torch
from fastvit import extension

capability = tuple(map(int, os.environ["CAPABILITY"].split(".")))
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: capability
torch.cuda.get_device_name = lambda *_: "a GPU"
torch.cuda.get_device_properties = lambda *_: Facts(total_memory=80e9)
extension.why_no_ops = lambda device: None
extension.build_info = lambda: Facts(cutlass="4.2.0")
"""
TWO_GPUS = {
    "test_graphed.py::test_the_gpu_of_the_model: needs 2 GPUs, and there is 1",
    "test_streams_and_graphs.py::test_runs_on_the_gpu_of_its_tensors: needs 2 GPUs, and there is 1 (5)",
}


def left_out(tmp_path, capability, *files):
    """On one GPU: what is left out, a line a test, and how many tests are not."""
    pytest.importorskip("timm")
    (tmp_path / "machine.py").write_text(MACHINE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "CAPABILITY": capability, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "machine", "--collect-only"]
    command += ["-q", "--confcutdir=tests/gpu", *(f"tests/gpu/{file}" for file in files or [""])]
    done = subprocess.run(
        command, cwd=FOLDER.parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    tests, _, said = done.stdout.partition("left out: this machine cannot show it")
    lines = [line for line in said.splitlines() if line.startswith("tests/gpu/")]
    return {line.removeprefix("tests/gpu/") for line in lines}, tests.count("::")


def test_one_h100_leaves_out_what_needs_two(tmp_path):
    found, count = left_out(tmp_path, "9.0")
    assert found == TWO_GPUS
    assert count > 600


def test_one_a100_leaves_out_what_is_for_hopper_too(tmp_path):
    files = {"test_fc1_parity.py", "test_smoke.py", "test_graphed.py"}
    found, _ = left_out(tmp_path, "8.0", *files, "test_streams_and_graphs.py", "test_native_parity.py")
    hopper = {line for line in found if "needs compute capability 9.0, and a GPU has 8.0" in line}
    assert found == TWO_GPUS | hopper
    assert {line.partition("::")[0] for line in hopper} == files
    text = (FOLDER / "test_fc1_parity.py").read_text()
    assert len([line for line in hopper if line.startswith("test_fc1")]) == text.count("\ndef test_")


def test_no_test_skips_for_what_a_machine_lacks():
    for path in FOLDER.glob("test_*.py"):
        assert set(re.findall(r"\w*skip\w*", path.read_text())) <= {"skip_on_a_cpu"}, path.name


def test_some_of_every_file_come_first():
    spec = importlib.util.spec_from_file_location("needs_of_gpu_tests", FOLDER / "needs.py")
    needs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(needs)
    item = namedtuple("Item", "path place")
    files = (FOLDER / "a.py", 4), (FOLDER / "b.py", 2)
    items = [item(path, place) for path, count in files for place in range(count)]
    others = [*items, item(FOLDER.parent / "c.py", 0)]
    before = list(others)
    needs.LeftOut(False, True).interleave(others)
    assert others == before
    needs.LeftOut(False, True).interleave(items)
    assert [f"{path.stem}{place}" for path, place in items] == ["a0", "b0", "a1", "a2", "b1", "a3"]
