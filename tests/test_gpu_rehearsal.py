"""`make gpu` from end to end with a GPU that is made up (fake_gpu), from a tree as it travels: no .git.

GPU_PYTHON chooses another Python, that of a machine with a GPU say; `make rehearsal` runs all stages.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastvit_benchmarks.gpu import findings

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("GPU_PYTHON") or sys.executable
BUDGET = os.environ.get("GPU_BUDGET")  # seconds for all stages; a part of them without
GPU = "h100-80gb-fake"
# The smoke tests that fail of the faults that are planted below.
CALLS = [("attention bfloat16", "fwd"), ("attention bfloat16", "bwd"), ("patch_embed bfloat16", "bwd")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What would travel: the sources as they are here, and links to find the packages by."""
    folder = tmp_path_factory.mktemp("travelled")
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "path").mkdir()
    (folder / "path" / "fastvit_kernels").symlink_to("../kernels")
    (folder / "path" / "fastvit_benchmarks").symlink_to("../benchmarks")
    return folder


@pytest.fixture
def go(tree, tmp_path):
    """Runs stages; returns the exit status, what was said, the outcomes by stage, and the results' folder."""

    def run(*stages, tests="", budget="3000", **environment):
        paths = [tree / "tests" / "fake_gpu", tree / "path", tree]
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT", "PYTEST"))
        }
        env |= {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "FASTVIT_COMMIT": "abc1234",
            "GPU_WORKERS": "2",
        }
        env |= {"FAKE_GPU_SLOWER": "1" if BUDGET else "5"}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTEST_ADDOPTS": f"--no-runtime {tests}"}
        archive = tmp_path / "out" / "day.tgz"
        words = ("--budget", budget, "--results", str(tmp_path / "results"), "--archive", str(archive))
        command = [PYTHON, "-m", "fastvit_benchmarks.gpu", *stages, *words]
        done = subprocess.run(
            command, cwd=tree, env=env | environment, capture_output=True, text=True, check=False
        )
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "back", filter="data")
        folder = tmp_path / "back" / "benchmarks" / "results" / GPU
        outcomes = {row["stage"]: row for row in json.loads((folder / "stages.json").read_text())}
        return done.returncode, done.stdout + done.stderr, outcomes, folder

    return run


def rows(folder, name):
    """Providers with what came of them, of all calls of a file."""
    return [
        (row.direction, row.provider, row.ok, row.reason or "")
        for row in findings.measured(folder / f"{name}.json")
    ]


@pytest.mark.skipif(not BUDGET, reason="all stages take minutes: make rehearsal")
def test_all_stages(go):
    _, said, found, _ = go(budget=BUDGET)
    assert list(found)[:6] == ["facts", "smoke", "parity", "ops", "ours", "baseline"], said
    for name, outcome in found.items():
        assert outcome["status"] in ("ok", "timed out", "absent"), (name, outcome)
        assert outcome["found"] or outcome["status"] == "absent", (name, outcome)
    assert ("not reached" in said) == (len(found) < 14)


def test_stages_keep_their_rows(go):
    names = ["parity", "ours", "baseline", "tables", "train"]
    _, said, found, folder = go(*names, tests="-k 'attention and every_option and bfloat16'")
    assert list(found) == ["facts", *names]
    assert {found[name]["status"] for name in names} == {"ok"}, said
    assert {"ours", "baseline", "measure_gpu", "train"} <= {path.stem for path in folder.glob("*.json")}
    assert {row.commit for row in findings.measured(folder / "ours.json")} == {"abc1234"}
    assert found["tables"]["commit"] == "abc1234"
    assert not [row for row in rows(folder, "train") if not row[2]]


def test_a_kernel_that_dies_hangs_or_is_wrong_costs_its_own_rows(go):
    plants = "attention_fwd=wrong,attention_bwd=hang,patch_embed_bwd=die"
    how = {"FAKE_GPU_PLANT": plants, "FAKE_GPU_PATIENCE": "8", "GPU_HANG": "40"}
    status, _, found, folder = go("smoke", "ops", tests="-k 'plain and bfloat16'", **how)
    assert status == 1
    tests = findings.lines(folder / "logs" / "smoke" / "tests.jsonl")
    failed = {row["test"].partition("[")[2].rstrip("]") for row in tests if row["outcome"] == "failed"}
    assert failed == {f"{call} plain {way}" for call, way in CALLS}
    assert len(tests) == 10, tests
    for op in ("layer_norm_linear", "linear_residual", "layer_norm_mlp"):
        assert all(ok for *_, ok, _ in rows(folder, f"ops-{op}"))
    for op, faults in {
        "attention": {"fwd": "wrong", "bwd": "watchdog"},
        "patch_embed": {"fwd": None, "bwd": "died"},
    }.items():
        found = rows(folder, f"ops-{op}")
        for direction, fault in faults.items():
            torchs = [ok for way, name, ok, _ in found if way == direction and not name.startswith("fastvit")]
            ours = [
                (ok, why) for way, name, ok, why in found if way == direction and name.startswith("fastvit")
            ]
            assert sum(torchs) >= 3
            assert len(ours) == 2
            assert all(ok == (fault is None) and (fault or "") in why for ok, why in ours), (op, ours)
