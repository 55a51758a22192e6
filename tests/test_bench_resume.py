"""A benchmark whose process died goes on with what was not run, and not with what it died of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastvit.cli import app
from fastvit_benchmarks import bench_attention, bench_model, model_peers, op_bench, op_screen, roofline
from fastvit_benchmarks.bench_attention import Attention
from fastvit_benchmarks.harness import load
from fastvit_benchmarks.model_peers import Peer
from fastvit_benchmarks.op_bench import differentiated

# Of the first case one of ours ends its process.
DIES = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_bench_resume import Ops
class Dies(Ops):
    def prepare(self, name, case):
        if name == "fastvit bad" and case.direction == "fwd":
            os._exit(9)
Dies(setattr).run("--json", sys.argv[1])
"""
NAMES = ("sdpa", "compiled", "fastvit good", "fastvit bad", "fastvit last")


class Ops:
    """`fastvit bench ops` on two small cases of attention; ``prepared`` says which providers were run."""

    def __init__(self, patch):
        self.prepared = []
        for peak in ("peak_gbps", "peak_tflops"):
            patch(op_bench, peak, lambda *where: 1.0)
        patch(roofline, "rows", lambda device, dtypes: [])
        patch(op_screen, "limits", lambda rows: "")
        cases = [Attention(way, "float32", 1, 5, 2, 4) for way in ("fwd", "bwd")]
        patch(bench_attention, "cases", lambda *chosen: cases)
        given = {name: self.provider(name) for name in NAMES}
        patch(bench_attention, "providers", lambda case, device: (given, {}))

    def provider(self, name):
        def prepare(case, inputs):
            self.prepare(name, case)
            return differentiated(case.reference)(case, inputs)

        return prepare

    def prepare(self, name, case):
        if (case.direction, name) not in self.prepared:
            self.prepared.append((case.direction, name))

    def run(self, *words):
        return CliRunner().invoke(
            app, ["bench", "ops", "attention", "--rounds", "1", "--device", "cpu", *words]
        )


@pytest.fixture
def ops(monkeypatch):
    return Ops(monkeypatch.setattr)


def died(path):
    """Of an earlier process; its rows."""
    command = [sys.executable, "-c", DIES, path, Path(__file__).parent]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # or it is another machine's run
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    return [(row.direction, row.provider) for row in load(path)]


def test_ops(ops, tmp_path):
    path = tmp_path / "rows.json"
    assert died(path) == [("fwd", "sdpa"), ("fwd", "compiled"), ("fwd", "fastvit good")]
    done = ops.run("--json", str(path), "--resume")
    assert done.exit_code == 0, done.output
    first = [("fwd", "sdpa"), ("fwd", "fastvit last")]
    ours_last = sorted(NAMES, key=lambda name: name.startswith("fastvit"))
    assert ops.prepared == [*first, *[("bwd", name) for name in ours_last]]
    rows = load(path)
    assert [row.provider for row in rows] == ours_last * 2
    (bad,) = [row for row in rows if not row.ok]
    assert (bad.direction, bad.provider, bad.ms_p50) == ("fwd", "fastvit bad", None)
    assert bad.reason == "its process died"
    assert "fastvit bad: not run: its process died" in done.output
    ops.prepared.clear()
    assert ops.run("--json", str(path), "--resume").exit_code == 0
    assert (ops.prepared, load(path)) == ([], rows)
    assert ops.run("--json", str(path)).exit_code == 0  # without --resume all is begun anew
    assert all(row.ok for row in load(path))


def test_notes_are_beside_the_rows_or_nowhere(ops, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ops.run().exit_code == 0
    assert not list(tmp_path.iterdir())
    assert ops.run("--json", "rows.json").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "rows.tried"}


def test_these_providers_alone(ops, monkeypatch):
    named = ("--provider", "fastvit bad", "--provider", "sdpa")
    assert ops.run(*named, "--filter", "fwd").exit_code == 0
    assert ops.prepared == [("fwd", "sdpa"), ("fwd", "fastvit bad")]
    assert "unknown provider 'bad'; the providers are sdpa; compiled; " in str(
        ops.run("--provider", "bad").exception
    )
    left_out = {}, {"elsewhere": "it is for others"}
    monkeypatch.setattr(bench_attention, "providers", lambda case, device: left_out)
    said = str(ops.run("--provider", "elsewhere").exception)
    assert said == "no case has elsewhere here: it is for others"


def test_models(tmp_path, monkeypatch, threads):
    threads(1)
    prepared, path = [], tmp_path / "rows.json"

    def peer(name):
        def prepare(model, x):
            prepared.append((len(x), name))
            return model

        return Peer(name, prepare)

    monkeypatch.setattr(model_peers, "TORCH", (peer("timm eager"), peer("timm compiled")))
    monkeypatch.setattr(model_peers, "OURS", (peer("fastvit"), peer("fastvit cpp")))
    monkeypatch.setattr(roofline, "rows", lambda device, dtypes: [])
    monkeypatch.setattr(op_screen, "limits", lambda rows: "")
    monkeypatch.setattr(roofline, "peak_tflops", lambda device, dtype: 1.0)
    monkeypatch.setattr(bench_model, "SETTLE", {"cpu": 0.0})

    def main(*words):
        how = ("test_vit", "--rounds", "1", "--device", "cpu", "--json", str(path))
        done = CliRunner().invoke(app, ["bench", "model", *how, *words])
        assert done.exit_code == 0, done.output
        return done.output

    main("--batch-size", "1", "--provider", "timm eager", "--provider", "fastvit")
    path.with_suffix(".tried").open("a").write(
        '{"begun": "test_vit, batch 2, float32: inference: fastvit"}\n'
    )
    prepared.clear()
    main("--batch-size", "1", "2", "--resume")
    assert prepared == [
        *((1, name) for name in ("timm eager", "timm compiled", "fastvit cpp")),
        *((2, name) for name in ("timm eager", "timm compiled", "fastvit cpp")),
    ]
    assert len(rows := load(path)) == 8
    assert [(row.batch, row.provider, row.reason) for row in rows if not row.ok] == [
        (2, "fastvit", "its process died")
    ]
    prepared.clear()
    assert "test_vit, batch" not in main("--batch-size", "1", "2", "--resume")
    assert prepared == []
