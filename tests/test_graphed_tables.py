"""A graph holds what was measured to gain in a graph; eager runs what gains in eager."""

import pytest
import torch
from accelerated import close, images, pair
from native_calls import needs_library
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import measurements
from fastvit.graph_cpu import Cpu
from fastvit.native_backend import machine_name

OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
ANY = {
    "width": [1, None],
    "rows": [1, None],
    "direction": "fwd",
    "options": "",
    "dtype": "float32",
    "ok": True,
}


class Served(TorchDispatchMode):
    """Notes the library's ops, and whether they ran for a graph."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastvit":
            self.seen.add(function.name())
        return function(*args, **kwargs or {})


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measurements, "_shipped", list)

    def write(ratio, graphed):
        speeds = {"gpu": machine_name("cpu"), "ratio": ratio, "graphed": graphed}
        measurements.keep([ANY | speeds | {"op": op, "options": o} for op in OPS for o in ("", "scaled")])

    yield write
    measurements.clear()


def in_eager(fast, x):
    with Served() as served:
        out = fast(x)
    return out, served.seen


def in_a_graph(fast, x, monkeypatch):
    """What a new runner gives, and the library's ops that its capture holds."""
    runner, capture, served = fastvit.graphed(fast, (len(x),)), Cpu.capture, Served()

    def noted(*args):
        with served:
            return capture(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Cpu, "capture", noted)
        out = runner(x)
    assert "replayed" in runner.explain(), runner.explain()
    return out, served.seen


@needs_library()
@pytest.mark.parametrize("first", ["eager", "graph"])
@pytest.mark.parametrize(("ratio", "graphed"), [(0.9, 1.2), (1.2, 0.9)])
@torch.no_grad()
def test_eager_asks_for_eager_and_a_runner_for_a_graph(table, monkeypatch, first, ratio, graphed):
    table(ratio, graphed)
    model, fast = pair()
    x = images()
    found = {}
    for name in ("eager", "graph", "eager") if first == "eager" else ("graph", "eager", "graph"):
        out, found[name] = in_eager(fast, x) if name == "eager" else in_a_graph(fast, x, monkeypatch)
        close(out, model(x))
    assert bool(found["eager"]) == (ratio > 1)
    assert bool(found["graph"]) == (graphed > 1)


@needs_library()
@torch.no_grad()
def test_explain_says_both(table):
    table(0.93, 1.21)
    _, fast = pair()
    reasons = {row.op: row.reason for row in fastvit.explain(fast, images()).rows}
    for op in OPS:
        assert "in eager 0.93, in a graph 1.21" in reasons[op]
