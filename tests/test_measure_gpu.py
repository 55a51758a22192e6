"""The questions of real models, and that what is measured answers them, without a GPU."""

import dataclasses
import itertools
import json
from contextlib import contextmanager

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastvit import gpus, measurements
from fastvit.backends import TABLE
from fastvit.ops import choices
from fastvit_benchmarks import op_bench
from fastvit_benchmarks.attempts import Attempts
from fastvit_benchmarks.machine import machine
from fastvit_benchmarks.tables import gpu_questions, measure_cpu, measure_gpu, tune
from fastvit_benchmarks.tables.gpu_questions import Asked, folded, fused, of_models
from fastvit_benchmarks.tables.measure_gpu import Book
from fastvit_benchmarks.tables.measured_table import Point

CPU = torch.device("cpu")
NOTES = {
    "gpu": "NVIDIA H100",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "date": "2026-11-25",
    "commit": "abc1234",
}


@contextmanager
def on_hopper(*batches):
    """Models are asked as on an H100, with tensors that have no data."""
    original = tune.run_without_data

    def run_without_data(model, args, kwargs, device, gradients):
        original(model, args, kwargs, "cuda", gradients)

    with pytest.MonkeyPatch.context() as patch, gpus.assume_arch("sm_90"):
        patch.setattr(tune, "run_without_data", run_without_data)
        patch.setattr(gpu_questions, "BATCHES", batches)
        yield gpus.gpu_of().name


FEW = (
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch14_dinov2", {"img_size": 224}),
    ("eva02_tiny_patch14_224", {}),
)


@pytest.fixture(scope="module")
def asked():
    with on_hopper(1, 8):
        return list(of_models(CPU, FEW, ("bfloat16",)))


@pytest.fixture
def hopper():
    with on_hopper() as name:
        yield name


def run(
    asked,
    tmp_path,
    gpu,
    measure=lambda one: (True, 1.1, None),
    deadline=1.0,
    clock=lambda: 0.0,
    tried=None,
    **book,
):
    said = []
    kept = Book(tmp_path / "gpu.json", NOTES | {"gpu": gpu}, **book)
    how = {"deadline": deadline, "say": said.append, "clock": clock, "attempts": Attempts(tried)}
    count = measure_gpu.run(asked, measure, kept, **how)
    return count, said, kept


def test_every_question_of_a_model_is_answered(asked, hopper, tmp_path, monkeypatch):
    """`auto` then takes ours at batches that were measured, between them and beyond, and nowhere else."""
    assert {one.point.op for one in asked} == set(TABLE)
    assert {one.point.dtype for one in asked} == {"bfloat16"}
    assert {one.point.options for one in asked} >= {"", "scaled", "rope", "gated"}
    run(asked, tmp_path, hopper)
    monkeypatch.setattr(measurements, "_shipped", lambda: [tmp_path / "gpu.json"])
    monkeypatch.setattr(measurements, "user_file", lambda: tmp_path / "none.json")
    measurements.clear()
    with on_hopper(1, 3, 64):
        others = list(of_models(CPU, FEW, ("bfloat16",)))
    assert others
    for one in others:
        p = one.point
        assert measurements.refusal(p.op, hopper, p.dtype, (p.direction,), p.options, p.sizes) is None, p
    (wide,) = {one.point.sizes["width"] for one in others if one.point.options == "gated"}
    how = (hopper, "bfloat16", ("fwd",), "gated")
    assert measurements.refusal("layer_norm_mlp", *how, {"width": 2 * wide, "rows": 257}) == "not measured"
    measurements.clear()


def test_each_question_is_asked_once_and_the_most_important_first():
    with on_hopper(1):
        alike = (FEW[0], ("deit_tiny_patch16_224", {}))
        asked = list(of_models(CPU, alike, ("bfloat16", "tf32")))
    kinds = [(one.point.dtype, one.point.direction) for one in asked]
    assert list(dict.fromkeys(kinds)) == [(d, w) for d in ("bfloat16", "tf32") for w in ("fwd", "bwd")]
    assert len({(one.point.kind, tuple(one.point.sizes.items())) for one in asked}) == len(asked)


def test_what_is_measured_is_written_as_it_comes_and_not_measured_again(asked, hopper, tmp_path):
    clock = itertools.count().__next__
    points = {"points_file": tmp_path / "points.json", "state": "one"}
    count, said, _ = run(asked, tmp_path, hopper, deadline=3, clock=clock, **points)
    assert count == len(said) == 3
    assert len(json.loads((tmp_path / "points.json").read_text())) == 3
    assert json.loads((tmp_path / "gpu.json").read_text())
    assert run(asked, tmp_path, hopper, **points)[0] == len(asked) - 3
    assert run(asked, tmp_path, hopper, **points)[0] == 0
    assert run(asked, tmp_path, hopper, **points | {"state": "other tiles"})[0] == len(asked)


def test_a_broken_file_of_points_is_begun_anew(asked, hopper, tmp_path):
    (tmp_path / "points.json").write_text("[{")
    assert run(asked[:2], tmp_path, hopper, points_file=tmp_path / "points.json", state="one")[0] == 2


def test_rows_of_what_is_not_measured_yet_stay(asked, hopper, tmp_path):
    run(asked, tmp_path, hopper)
    before = json.loads((tmp_path / "gpu.json").read_text())
    run(asked[:1], tmp_path, hopper, measure=lambda one: (True, 0.5, None))
    after = json.loads((tmp_path / "gpu.json").read_text())
    fields = ("op", "dtype", "direction", "options")
    first = asked[0].point.kind
    assert [row["ratio"] for row in after if tuple(row[f] for f in fields) == first] == [0.5]
    others = [row for row in before if tuple(row[f] for f in fields) != first]
    assert len(others) > 10
    assert all(row in after for row in others)


def test_a_graph_s_verdict_is_kept_beside_eager_s(asked, hopper, tmp_path):
    points = {"points_file": tmp_path / "points.json", "state": "one"}
    _, said, _ = run(asked[:1], tmp_path, hopper, measure=lambda one: (True, 0.5, 1.25), **points)
    assert said[0].startswith(" 0.50x in eager, 1.25x in a graph ")
    written = (tmp_path / "gpu.json").read_text()
    assert {(row["ratio"], row["graphed"]) for row in json.loads(written)} == {(0.5, None), (None, 1.25)}
    _, _, again = run(asked[:1], tmp_path, hopper, **points)
    again.write()
    assert (tmp_path / "gpu.json").read_text() == written


def test_what_does_not_run_is_said_and_has_no_row(asked, hopper, tmp_path):
    count, said, _ = run(asked[:1], tmp_path, hopper, measure=lambda one: "torch: not enough memory")
    assert (count, len(said)) == (0, 1)
    assert said[0].endswith(": torch: not enough memory")
    assert not (tmp_path / "gpu.json").exists()


def test_what_a_run_died_of_is_not_measured_by_the_next_of_the_same_sources(asked, hopper, tmp_path):
    class Died(Exception):
        pass

    tried, points = tmp_path / "gpu.tried", {"points_file": tmp_path / "points.json"}

    def dies(one):
        if one is asked[1]:
            raise Died(tried.read_text())  # all that a process that dies here leaves
        return True, 1.1, None

    with pytest.raises(Died) as death:
        run(asked[:3], tmp_path, hopper, dies, tried=tried, state="one", **points)
    tried.write_text(str(death.value))
    count, said, book = run(asked[:3], tmp_path, hopper, tried=tried, state="one", **points)
    assert count == 1
    assert said[0].endswith(": its process died")
    assert not book.has(asked[1].point)
    assert run(asked[:3], tmp_path, hopper, tried=tried, state="two", **points)[0] == 3


def small(factor):
    """A question whose two sides can run here; ours is off by the factor."""
    case = measure_cpu.Variant("fwd", "float32", 1, 24, 16, "layer_norm_linear", "")
    right = gpu_questions.differentiated(case.reference)
    ours = gpu_questions.differentiated(lambda **inputs: factor * case.reference(**inputs))
    return Asked(Point("layer_norm_linear", "float32", "fwd", "", {}, False, 0.0), case, right, ours)


@pytest.fixture(autouse=True)
def _no_roofline(monkeypatch):
    for peak in ("peak_gbps", "peak_tflops"):
        monkeypatch.setattr(op_bench, peak, lambda *where: 1.0)


def test_a_measurement_judges_and_compares():
    ok, ratio, graphed = measure_gpu.measured(small(1.0), CPU)
    assert ok
    assert graphed is None
    assert 0.1 < ratio < 10
    assert measure_gpu.measured(small(1.01), CPU) == (False, 0.0, None)


def test_a_side_that_cannot_run_is_no_measurement():
    def refuse(case, inputs):
        raise RuntimeError("no kernel")

    asked = small(1.0)
    found = measure_gpu.measured(Asked(asked.point, asked.case, asked.torchs, refuse), CPU)
    assert found == "ours: no kernel"


def test_a_side_without_memory_is_no_measurement():
    def exhaust(case, inputs):
        raise torch.OutOfMemoryError

    asked = small(1.0)
    found = measure_gpu.measured(Asked(asked.point, asked.case, exhaust, asked.ours), CPU)
    assert found == "torch: not enough memory"


def test_fused_is_asked_as_the_op_asks_it():
    """Of two forms of the library, by the sizes that `choices.fuses` names."""
    found = list(fused())
    assert {one.point.kind for one in found} == {
        ("layer_norm_mlp", dtype, direction, "fused")
        for dtype in ("bfloat16", "float16")
        for direction in ("fwd", "bwd")
    }
    assert all(one.point.sizes.keys() == {"width", "hidden", "rows"} for one in found)
    assert all(one.torchs is not one.ours for one in found)
    one = found[0].point
    x = torch.empty(one.sizes["rows"] // 197, 197, one.sizes["width"], device="meta", dtype=torch.bfloat16)
    weight = torch.empty(one.sizes["hidden"], one.sizes["width"], device="meta", dtype=torch.bfloat16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), gpus.assume_arch("sm_90"):
        x, weight = (torch.empty(t.shape, device="cuda", dtype=t.dtype) for t in (x, weight))
        with measurements.listening() as questions:
            choices.fuses(x, weight, torch.bfloat16, "fwd")
    (question,) = questions
    assert (question.op, question.dtype, *question.directions, question.options) == one.kind
    assert question.sizes == one.sizes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    app = typer.Typer()
    app.command()(measure_gpu.main)
    assert CliRunner().invoke(app, []).exit_code == 1


def test_models_and_dtypes_that_are_asked_for_keep_their_order(monkeypatch):
    here, chosen = machine(), []
    monkeypatch.setattr(measure_gpu, "machine", lambda: dataclasses.replace(here, gpu="NVIDIA A100"))
    monkeypatch.setattr(measure_gpu, "of_models", lambda device, *how: chosen.append(how) or ())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    app = typer.Typer()
    app.command()(measure_gpu.main)
    for words in ([], ["--models", "2", "--dtype", "tf32", "--dtype", "bfloat16"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert chosen == [
        (gpu_questions.MODELS, list(gpu_questions.MODES)),
        (gpu_questions.MODELS[:2], ["bfloat16", "tf32"]),
    ]
    assert "unknown dtype 'int8'; the dtypes are " in CliRunner().invoke(app, ["--dtype", "int8"]).output


@pytest.mark.parametrize(("op", "inner"), [("layer_norm_mlp", "hidden"), ("layer_norm_linear", "out")])
def test_folded_is_asked_as_the_op_asks_it(op, inner):
    one, *_ = (asked.point for asked in folded() if asked.point.op == op)
    with torch._subclasses.FakeTensorMode(), gpus.assume_arch("sm_90"):
        x = torch.empty(
            one.sizes["rows"] // 197, 197, one.sizes["width"], device="cuda", dtype=torch.bfloat16
        )
        weight = torch.empty(one.sizes[inner], one.sizes["width"], device="cuda", dtype=torch.bfloat16)
        with measurements.listening() as questions:
            choices.folds(op, x, (weight,), torch.bfloat16)
    (question,) = questions
    assert (question.op, question.dtype, *question.directions, question.options) == one.kind
    assert question.sizes == one.sizes
