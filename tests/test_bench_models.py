"""Whole models in the benchmarks: who is offered, who is refused, and what is left after Ctrl-C."""

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastvit.cli import app
from fastvit_benchmarks import bench_model, commands, engines, model_peers, roofline
from fastvit_benchmarks.bench_model import Subject
from fastvit_benchmarks.harness import Stopped, Timing, load, measure, rotating
from fastvit_benchmarks.model_peers import Peer
from fastvit_benchmarks.model_screen import Shown
from fastvit_benchmarks.outputs import Outputs

CPU = torch.device("cpu")
NAME = "test_vit"  # of 64-channel blocks on images of 160 pixels
EAGER = Peer("timm eager", model_peers.eager)


@pytest.fixture(autouse=True)
def _small_roofline(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(roofline, "rows", lambda device, dtypes: [])
    monkeypatch.setattr(roofline, "peak_tflops", lambda device, dtype: 1.0)
    monkeypatch.setattr(commands.op_screen, "limits", lambda rows: "")
    monkeypatch.setattr(bench_model, "SETTLE", {"cpu": 0.0})


@pytest.fixture
def subject():
    return Subject(NAME, 2, "float32", CPU)


class Screen(Console):
    """Keeps the tables that it shows."""

    def __init__(self):
        super().__init__(file=io.StringIO(), width=120)
        self.tables = []

    def print(self, *objects, **how):
        self.tables += [one for one in objects if isinstance(one, Shown)]
        super().print(*objects, **how)


def run(subject, *peers, rounds=2) -> Shown:
    bench_model.run(subject, peers, rounds, screen := Screen(), Outputs())
    (shown,) = screen.tables
    return shown


def off_by(factor, name="off") -> Peer:
    return Peer(name, lambda model, x: lambda images: factor * model(images))


def test_rows_of_every_provider(subject):
    shown = run(subject, EAGER, Peer("fastvit", model_peers.ours))
    assert [row.provider for row in shown.rows] == ["timm eager", "fastvit"]
    for row in shown.rows:
        assert row.ok
        assert (row.op, row.batch, row.shape, row.direction) == (NAME, 2, (3, 160, 160), "fwd")
        assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert row.tflops > 0
        assert row.error_ratio > 0
    assert shown.speeds.keys() == {"timm eager", "fastvit"}


def test_flops_are_those_of_the_published_table():
    model = Subject("vit_base_patch16_224", 1, "float32", CPU).model().eval()
    assert bench_model.flops(model, torch.zeros(1, 3, 224, 224)) == pytest.approx(35.1e9, rel=0.01)


def test_a_deliberately_wrong_provider_of_ours_has_no_time_and_others_no_speed(subject):
    shown = run(subject, EAGER, off_by(1.001), off_by(1.001, "fastvit off"))
    torchs, ours = shown.rows[1:]
    for wrong in (torchs, ours):
        assert not wrong.ok
        assert wrong.error_ratio > 10
        assert wrong.provider not in shown.speeds
    assert ours.ms_p50 is ours.tflops is None
    assert torchs.ms_p50 > 0
    console = Console(file=io.StringIO(), width=120)
    console.print(shown)
    assert console.file.getvalue().count("WRONG") == 2
    assert "off: wrong: output" in console.file.getvalue()
    assert all(row.ok for row in run(subject, EAGER, off_by(1.0)).rows)


def test_a_deliberately_slow_provider_shows(subject):
    def slow(model, x):
        return lambda images: torch.stack([model(images) for _ in range(5)])[0]

    shown = run(subject, EAGER, Peer("slow", slow), rounds=7)
    assert shown.speeds["slow"] < 0.5


def test_who_cannot_run_has_a_row_with_the_reason_and_who_is_left_out_none(subject):
    def broken(model, x):
        raise RuntimeError("no kernel image\nand more")

    elsewhere = Peer("elsewhere", model_peers.eager, lambda device, dtype: "it is for others")
    shown = run(subject, EAGER, Peer("broken", broken), elsewhere)
    assert shown.left_out == {"elsewhere": "it is for others"}
    assert [(row.provider, row.reason) for row in shown.rows] == [
        ("timm eager", None),
        ("broken", "no kernel image"),
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(shown)
    assert "broken: not run: no kernel image" in console.file.getvalue()
    assert "elsewhere: not run: it is for others" in console.file.getvalue()


@pytest.mark.parametrize("name", ["stops", "fastvit stops"])
def test_control_c_keeps_the_rounds_that_were_over(subject, name):
    turn = []

    def stops(model, x):
        def call(images):
            turn.append(0)
            if len(turn) == 7:  # judged once, two rounds of warm-up: in the fourth that counts
                raise KeyboardInterrupt
            return model(images)

        return call

    kept = Outputs()
    with pytest.raises(KeyboardInterrupt):
        bench_model.run(subject, (EAGER, Peer(name, stops)), 9, screen := Screen(), kept)
    assert [(row.provider, row.ms_p50 is not None) for row in kept.rows] == [
        ("timm eager", True),
        (name, True),
    ]
    assert screen.tables[0].rows == kept.rows


def test_rounds_that_were_not_over_are_not_kept():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        measure({"a": int, "b": stop}, rounds=3, warmup=0)
    assert not isinstance(caught.value, Stopped)
    calls = {
        "a": rotating(lambda do: do(), [int, int, int]),
        "b": rotating(lambda do: do(), [int, int, stop]),
    }
    with pytest.raises(Stopped) as caught:
        measure(calls, rounds=3, warmup=0)
    assert {name: len(timing.samples) for name, timing in caught.value.timings.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("peer", model_peers.ENGINES, ids=lambda peer: peer.name)
def test_other_engines_compute_the_model(peer, subject):
    if reason := peer.missing(CPU, torch.float32):
        pytest.skip(reason)
    shown = run(subject, EAGER, peer)
    assert [row.provider for row in shown.rows] == ["timm eager", peer.name]
    assert all(row.ok for row in shown.rows), shown.rows


def test_engines_say_what_they_cannot_do():
    half, gpu = torch.bfloat16, torch.device("cuda")
    assert engines.why_not_onnxruntime(CPU, half) == "its CPU kernels are not made for bfloat16"
    assert engines.why_not_openvino(gpu, half) == "it is for CPUs"
    assert engines.why_not_openvino(CPU, torch.float16) == "on a CPU it computes float16 in float32"
    assert engines.why_not_tensorrt(CPU, half) == "it is for CUDA GPUs"


def test_every_engine_and_gpu_is_offered_somewhere():
    everyone = (*model_peers.TORCH, model_peers.MAX_AUTOTUNE, *model_peers.OURS, *model_peers.ENGINES)
    assert len({peer.name for peer in everyone}) == len(everyone)
    gpu = torch.device("cuda")
    for peer in everyone[: -len(model_peers.ENGINES)]:
        assert None in (peer.missing(CPU, torch.float32), peer.missing(gpu, torch.bfloat16))


def test_the_frozen_model_is_a_copy(subject):
    model = subject.model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for peer in (EAGER, Peer("fastvit", model_peers.ours), model_peers.OURS[1]):
        with torch.no_grad():
            peer.prepare(model, subject.images(1)[0])
    assert type(model).__module__.startswith("timm")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_command_line(monkeypatch, tmp_path):
    for name, kept in (("TORCH", (EAGER,)), ("OURS", (off_by(1.0),)), ("ENGINES", ())):
        monkeypatch.setattr(model_peers, name, kept)

    def main(*arguments):
        command, *rest = arguments
        return CliRunner().invoke(app, ["bench", command, "--rounds", "1", "--device", "cpu", *rest])

    path = tmp_path / "rows.json"
    done = main(
        "compare", NAME, "--batch-size", "2", "1", "2", "--json", str(path), "--png", str(tmp_path / "a.png")
    )
    assert done.exit_code == 0, done.output
    assert [(row.batch, row.provider) for row in load(path)] == [
        (2, "timm eager"),
        (2, "off"),
        (1, "timm eager"),
        (1, "off"),
    ]
    assert (tmp_path / "a.png").exists()
    assert main("model", NAME, "--batch-size", "1", "--provider", "off", "--json", str(path)).exit_code == 0
    assert [row.provider for row in load(path)] == ["off"]
    for wrong, said in (
        (("model", "vit_none"), "timm has no model 'vit_none'"),
        (("model", NAME, "--dtype", "int8"), "unknown dtype 'int8'"),
        (
            ("model", NAME, "--provider", "fastvit"),
            "unknown provider 'fastvit'; the providers are timm eager; off",
        ),
        (
            ("train", NAME, "--provider", "off"),
            "the providers are timm eager; timm compiled; fastvit; fastvit",
        ),
        (("train", NAME, "--fail-if-slower", "x", "--baseline", "y"), "'x' is not a percentage"),
        (("model", NAME, "--device", "cuda"), "torch sees no CUDA GPU here"),
    ):
        assert said in str(main(*wrong).exception)
    assert main("model", NAME, "--batch-size", "0").exit_code == 2
    assert main("model", "8").exit_code == 2


def test_control_c_on_the_command_line(monkeypatch, tmp_path):
    def stop(*how):
        raise Stopped({"a": Timing((1.0,))})

    monkeypatch.setattr(bench_model, "run", stop)
    done = CliRunner().invoke(app, ["bench", "model", NAME, "--device", "cpu"])
    assert done.exit_code == 130
    assert "stopped: 0 rows" in done.output
