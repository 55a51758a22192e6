"""Training in the benchmarks: gradients in slices, one graph at a time, and who is wrong or cannot run."""

import copy
import io
import weakref
from dataclasses import dataclass

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fastvit
from fastvit.verification import randomize
from fastvit_benchmarks import bench_model, bench_train, roofline
from fastvit_benchmarks.bench_model import Subject
from fastvit_benchmarks.bench_train import Backward, Trained, exact
from fastvit_benchmarks.harness import measure
from fastvit_benchmarks.outputs import Outputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch, threads):
    """A small model on small images, on one thread, which waits for no other."""
    threads(1)
    monkeypatch.setattr(bench_model, "image_of", lambda name: (3, 32, 32))
    tiny = lambda self: randomize(timm.create_model(self.name, img_size=32, depth=1))  # noqa: E731
    monkeypatch.setattr(Subject, "model", tiny)
    monkeypatch.setattr(roofline, "peak_tflops", lambda device, dtype: 1.0)
    monkeypatch.setattr(bench_model, "SETTLE", {"cpu": 0.0})


class Off(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.01 * self.inner(x)


def refuse(x):
    raise NotImplementedError("no rule for this")


def run(subject, makers):
    bench_train.run(subject, makers, 2, console := Console(file=io.StringIO(), width=120), kept := Outputs())
    return kept.rows, console.file.getvalue()


def test_training():
    makers = {"timm eager": lambda own: own, "fastvit": fastvit.accelerate, "off": Off, "fastvit off": Off}
    rows, said = run(Subject("test_vit", 2, "float32", CPU), makers | {"fastvit broken": lambda own: refuse})
    titles = [line.rstrip() for line in said.splitlines() if line.startswith("test_vit")]
    assert titles == [f"test_vit, batch 2, float32: training, {way}" for way in ("fwd", "bwd", "step")]
    for direction in ("fwd", "bwd", "step"):
        found = {row.provider: row for row in rows if row.direction == direction}
        assert {name: (row.ok, row.ms_p50 is not None) for name, row in found.items()} == {
            "timm eager": (True, True),
            "off": (False, True),
            "fastvit": (True, True),
            "fastvit off": (False, False),
            "fastvit broken": (False, False),
        }
        assert found["off"].reason.startswith("wrong: ")
        assert found["fastvit broken"].reason == "no rule for this"
        assert all(row.peak_mb > 0 for row in rows if row.provider != "fastvit broken")
        assert found["timm eager"].tflops > 0


def test_what_one_direction_has_no_memory_for_the_others_keep(monkeypatch):
    class Exhausted(torch.optim.AdamW):
        def step(self, closure=None):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim, "AdamW", Exhausted)
    makers = {"timm eager": lambda own: own, "fastvit": fastvit.accelerate}
    rows, _ = run(Subject("test_vit", 2, "float32", CPU), makers)
    found = {row.direction: (row.ok, row.reason) for row in rows if row.provider == "fastvit"}
    assert found == {"fwd": (True, None), "bwd": (True, None), "step": (False, "not enough memory")}


def test_gradients_of_slices_are_those_of_the_batch(monkeypatch):
    monkeypatch.setattr(bench_train, "SLICE", 3)
    subject = Subject("test_vit", 7, "float32", CPU)
    model, (x,) = subject.model().train(), subject.images(1)
    wide = copy.deepcopy(model).double()
    whole, sliced = Trained(wide, wide).gradients(x.double()), exact(model, x)
    assert sliced.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(
            sliced[name], gradient, rtol=1e-12, atol=1e-12 * gradient.abs().max().item()
        )


def test_the_statistics_of_a_batch_are_not_sliced(monkeypatch):
    monkeypatch.setattr(bench_train, "SLICE", 3)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()).train()
    x = torch.randn(7, 4)
    wide = copy.deepcopy(model).double()
    whole, found = Trained(wide, wide).gradients(x.double()), exact(model, x)
    assert all(torch.equal(found[name], gradient) for name, gradient in whole.items())


class Graph:
    """What every tensor that a graph has saved refers to."""


@dataclass
class Held:
    graph: Graph
    tensor: torch.Tensor


class Watched(nn.Module):
    """Says how many graphs of all models are alive when it begins one."""

    alive, most = weakref.WeakSet(), 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        graph = Graph()
        Watched.alive.add(graph)
        Watched.most = max(Watched.most, len(Watched.alive))
        with saved_tensors_hooks(lambda t: Held(graph, t.detach()), lambda held: held.tensor):
            return self.inner(x)


def test_one_graph_is_alive_at_a_time(monkeypatch):
    monkeypatch.setattr(Watched, "most", 0)
    makers = dict.fromkeys(("timm eager", "timm compiled", "fastvit", "fastvit compiled"), Watched)
    rows, _ = run(Subject("test_vit", 2, "float32", CPU), makers)
    assert all(row.ok for row in rows)
    assert len(rows) == 12
    assert Watched.most == 1


def test_the_backward_is_timed_without_its_forward():
    """In rounds that stay interleaved, by a clock that only passes of the model turn."""
    now, order = [0.0], []

    class Pass(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            now[0] += 100.0
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            order.append(ctx.name)
            now[0] += 1.0
            return grad, None

    calls = {}
    for name in "ab":
        model = nn.Linear(2, 2)
        trained = Trained(lambda x, name=name, model=model: Pass.apply(model(x), name), model)
        calls[name] = Backward(trained, torch.ones(1, 2))
    before = {name: call.before for name, call in calls.items()}
    timings = measure(calls, rounds=3, warmup=0, clock=lambda: now[0], before=before)
    assert order == ["a", "b"] * 3
    assert timings["a"].samples == timings["b"].samples == (1000.0,) * 3
