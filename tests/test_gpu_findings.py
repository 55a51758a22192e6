"""What is read from what the stages of `make gpu` leave, and the page that is made of it."""

import dataclasses
import json

import pytest
from test_gpu_runner import FACTS, rows

from fastvit_benchmarks.gpu import findings, packed, report
from fastvit_benchmarks.gpu.facts import slug
from fastvit_benchmarks.harness import save


def lines(path, *found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def outcome(test, outcome, why=""):
    return {"test": f"test_x.py::{test}", "outcome": outcome, "why": why}


@pytest.mark.parametrize(
    ("found", "text", "fault"),
    [
        ([outcome("a", "passed"), outcome("b", "passed")], "2 passed", ""),
        ([outcome("a", "failed"), outcome("a", "passed")], "1 passed", ""),  # its worker died, and again
        ([outcome("a", "passed"), outcome("b", "skipped")], "1 passed, 1 skipped", "1 skipped"),
        ([outcome("a", "failed")], "1 failed", "no test passed"),
        ([], "", "no test passed"),
    ],
)
def test_a_skipped_test_fails_the_stage(tmp_path, found, text, fault):
    files = findings.Files(tmp_path, "parity")
    lines(files.logs / "tests.jsonl", *found)
    assert findings.tests(files) == findings.Finding(text, fault)


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        ("16 calls ran\n========= ERROR SUMMARY: 0 errors", False),
        ("========= ERROR SUMMARY: 0 errors", True),
        ("16 calls ran", True),
    ],
)
def test_a_sanitizer_must_have_come_to_its_end(tmp_path, log, fault):
    files = findings.Files(tmp_path, "memcheck")
    files.logs.mkdir(parents=True)
    files.log.write_text(log)
    assert bool(findings.sanitized(files).fault) == fault


def test_the_report_says_causes_errors_and_times(tmp_path):
    why = "trace\nE   AssertionError: out, rms 3.00e-02 over 1.00e-02\n"
    bad = [outcome(f"t[{i}]", "failed", why) for i in range(3)]
    lines(tmp_path / "logs" / "parity" / "tests.jsonl", *bad, outcome("good", "passed"))
    check = {"name": "out", "dtype": "bfloat16", "kind": "op", "e_rms": 3e-3, "b_rms": 2e-3}
    lines(tmp_path / "logs" / "parity" / "checks.1.jsonl", check, check | {"e_rms": 1e-3})
    (tmp_path / "logs" / "parity" / "checks.1.jsonl").open("a").write('{"name": "torn')
    eager, ours, graphed = rows(("timm eager", 8, 6.0), ("fastvit", 8, 2.0), ("fastvit graphed", 8, None))
    graphed = dataclasses.replace(graphed, reason="its process died")
    save([eager, dataclasses.replace(ours, speed=2.9), graphed], tmp_path / "model.json")
    assert list(report.failures(tmp_path)) == [
        "3x test_x.py: AssertionError: out, rms 3.00e-02 over 1.00e-02 | t[0]"
    ]
    assert list(report.errors(tmp_path)) == ["bfloat16 op: out 1.50"]
    (line,) = report.times(tmp_path)
    assert "timm eager 6, fastvit 2 2.90x, fastvit graphed - (its process died)" in line


def test_names_of_gpus():
    assert slug("NVIDIA H100 80GB HBM3") == FACTS.slug == "h100-80gb-hbm3"
    assert slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_a_folder_that_is_no_pack_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make gpu-pack"):
        packed.unpack(tmp_path, tmp_path / "cache")
