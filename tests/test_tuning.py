"""tune: what it measures, what it keeps, and that `auto` goes by it."""

import json

import pytest
import torch
from accelerated import images, pair, run
from native_calls import needs_library

import fastvit
from fastvit import measurements, tuning
from fastvit.native_backend import machine_name
from fastvit_benchmarks.recorded import Recorded
from fastvit_benchmarks.tables import tune as measuring

X = images(batch=4)


@pytest.fixture(autouse=True)
def _own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measurements.clear()
    yield
    measurements.clear()


@pytest.fixture
def fast(monkeypatch):
    """Short measurements."""
    original = measuring.run_case
    monkeypatch.setattr(
        measuring, "run_case", lambda *args, **how: original(*args, **how | {"rounds": 2, "seconds": 0.0})
    )


def test_on_a_cpu_there_is_nothing_to_tune():
    model, _ = pair()
    result = fastvit.tune(model, X)
    assert result.rows == ()
    assert str(result) == "there is nothing to tune on a CPU: `auto` goes by the table that fastvit ships"
    assert not measurements.user_file().exists()


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="Linear has no block of a vision transformer: nothing to tune"):
        fastvit.tune(torch.nn.Linear(2, 2), cpu=True)


@needs_library()
@pytest.mark.parametrize("kind", ["vit", "eva"])
def test_each_kind_of_call_is_measured_once_and_auto_goes_by_it(kind, fast, monkeypatch):
    model, _ = pair(kind)
    steps, totals = [], []
    result = fastvit.tune(model, X, cpu=True, on_start=totals.append, on_step=steps.append)
    assert totals == [len(steps)] == [len(result.rows)] == [3]
    assert {row.op for row in result.rows} == {"layer_norm_linear", "linear_residual", "layer_norm_mlp"}
    assert {row.direction for row in result.rows} == {"fwd"}
    assert {row.before for row in result.rows} == {"not measured"}
    assert all(row.ok and row.ratio > 0 for row in result.rows)
    assert all(f"rows {4 * 17}" in row.sizes for row in result.rows if kind == "vit")
    kept = json.loads(result.file.read_text())
    assert {row["gpu"] for row in kept} == {machine_name("cpu")}
    taken = {e.op: e.backend for e in run(model, X)[1] if e.op in {row.op for row in result.rows}}
    assert taken == {row.op: "cpp" if row.ratio >= 1 else "reference" for row in result.rows}
    assert {e.backend for e in run(model, images(batch=2))[1]} == {"reference"}  # another size

    again = fastvit.tune(model, X, cpu=True)
    assert len(json.loads(again.file.read_text())) == 3
    was = {row.op: "the kernel" if row.ratio >= 1 else "times torch's speed" for row in result.rows}
    assert all(was[row.op] in row.before for row in again.rows)


@needs_library()
def test_in_training_gradients_are_measured_too(fast):
    model, _ = pair()
    result = fastvit.tune(model.train(), X, cpu=True)
    assert sorted({row.direction for row in result.rows}) == ["bwd", "fwd"]
    assert len(result.rows) == 6
    assert all(row.ok for row in result.rows)


@needs_library()
def test_a_wrong_kernel_is_kept_as_wrong(fast, monkeypatch):
    original = Recorded.on
    monkeypatch.setattr(
        Recorded, "on", lambda self, backend: lambda **given: original(self, backend)(**given) * 1.001
    )
    model, _ = pair()
    result = fastvit.tune(model, X, cpu=True)
    assert not any(row.ok for row in result.rows)
    assert {row.now for row in result.rows} == {"torch: it misses the parity contract"}
    assert "WRONG" in str(result)
    assert {e.backend for e in run(model, X)[1]} == {"reference"}


@needs_library()
def test_rows_of_other_models_stay(fast):
    small, _ = pair()
    wide, _ = pair(embed_dim=96)
    fastvit.tune(small, X, cpu=True)
    file = fastvit.tune(wide, X, cpu=True).file
    assert len(json.loads(file.read_text())) == 6


def test_attention_is_measured_on_the_packed_projection():
    q, k, v = torch.randn(2, 17, 3, 2, 32).unbind(2)
    norms = dict.fromkeys(("q_norm_weight", "k_norm_weight"), torch.ones(32))
    case = Recorded.of("attention", (q, k, v), {"qk_norm": "layer_norm", **norms}, "fwd", "float32")
    given = case.inputs(0, torch.device("cpu"))
    assert given["qkv"].shape == (2, 17, 192)
    grad = given.pop("grad")
    assert grad.shape == (2, 17, 64)
    torch.testing.assert_close(case.on("reference")(**given), case.reference(**given))


def test_as_text():
    row = tuning.Tuned("attention", "bfloat16", "fwd", "head_dim 64", True, 1.25, "not measured")
    result = tuning.Tuning((row,))
    assert str(result).splitlines()[1].split() == [
        *("attention", "bfloat16", "fwd", "head_dim", "64", "1.25x", "not", "measured", "the", "kernel")
    ]
    assert json.loads(result.to_json())["rows"][0]["now"] == "the kernel"


@pytest.mark.parametrize(
    ("ratio", "graphed", "now"),
    [
        (0.9, 1.2, "torch, in a graph the kernel"),
        (1.1, 0.9, "the kernel, in a graph torch"),
        (1.1, 1.2, "the kernel"),
        (0.8, 0.9, "torch"),
    ],
)
def test_eager_and_graph_are_said_both(ratio, graphed, now):
    row = tuning.Tuned("attention", "bfloat16", "fwd", "head_dim 64", True, ratio, "not measured", graphed)
    assert row.now == now
    assert f"{ratio:.2f}x, in a graph {graphed:.2f}x" in str(tuning.Tuning((row,)))
