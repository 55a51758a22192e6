"""CUDA graphs without a GPU, a CPU's that are counted, small models, and what a runner is to give.

Like a graph the fake goes on reading the memory that it read as it was captured: of parameters, buffers
and what was derived from them, and not what modules hold by then.
"""

import importlib
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvit import derived, graph_trial, graphed
from fastvit.graph_calls import copies
from fastvit.graph_cpu import Cpu

runners = importlib.import_module("fastvit.graphed")
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Fake:
    """A GPU of which a test can ask how often it captured and replayed."""

    is_asynchronous = True
    captures = replays = renewals = 0
    capturing = False
    model: nn.Module

    def __init__(self, device):
        self.device = device

    def renew(self):
        Fake.renewals += 1

    def turn(self):
        return nullcontext()

    @staticmethod
    def is_capturing():
        return Fake.capturing

    def on_trial(self, forward, inputs):
        forward(copies(inputs))
        return graph_trial.outside("cpu", forward, inputs)

    def capture(self, forward, places, inputs):
        Fake.captures += 1
        graph, inputs = FakeGraph(Fake.model, forward), [place.empty() for place in places]
        for tensor in inputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)  # anything may lie there
        Fake.capturing = True
        try:
            return graph, inputs, graph.record(inputs)
        finally:
            Fake.capturing = False


class Taped(Cpu):
    """A CPU, likewise."""

    def renew(self):
        Fake.renewals += 1

    def capture(self, forward, places, inputs):
        Fake.captures += 1
        Fake.capturing = True
        try:
            graph, *rest = super().capture(forward, places, inputs)
        finally:
            Fake.capturing = False
        return Counted(graph), *rest

    @staticmethod
    def is_capturing():
        return Fake.capturing


class Counted:
    def __init__(self, graph):
        self.graph = graph

    def replay(self):
        Fake.replays += 1
        self.graph.replay()


class FakeGraph:
    def __init__(self, model, run):
        self.model, self.run = model, run
        self.memory = {name: t.detach() for name, t in named_tensors(model).items()}
        self.read = []

    def record(self, inputs):
        kept = derived.kept

        def noted(*args):
            self.read.append(kept(*args))
            return self.read[-1]

        self.inputs = inputs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(derived, "kept", noted)
            self.outputs = self.run([tensor.detach() for tensor in inputs])
        return self.outputs

    def replay(self):
        Fake.replays += 1
        read = iter(self.read)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(derived, "kept", lambda *args: next(read))
            swapped = nn.utils.stateless._reparametrize_module(self.model, self.memory)
            with swapped, torch.inference_mode(False):
                again = self.run([tensor.detach() for tensor in self.inputs])
            for place, new in zip(tree_leaves(self.outputs), tree_leaves(again), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)


def named_tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


class Model(nn.Module):
    """What a ViT has for a runner: plain weights, a buffer, and a weight that is folded."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(3 * 8 * 8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)
        self.gamma = nn.Parameter(torch.randn(4))

    def folded(self):
        return self.head.weight * self.gamma[:, None], self.head.bias * self.gamma

    def forward(self, x):
        x = self.norm(self.embed(x.flatten(1).to(self.embed.weight.dtype)))
        sources = self.head.weight, self.head.bias, self.gamma
        return nn.functional.linear(x, *derived.kept("folded", sources, self.folded) or self.folded())


class Plain(Model):
    """Nothing is derived."""

    def forward(self, x):
        return self.head(self.norm(self.embed(x.flatten(1))))


class Mixed(Plain):
    def forward(self, x, scale=1.0, *, mask=None, name="", extra=()):
        x = super().forward(x) * scale
        x = x if mask is None else x * mask
        return {"x": x, "rest": (x[:, 0], x.sum(), name, None, *extra)}


DEVICES = {"GPU": Fake, "CPU": Taped}


@contextmanager
def on_device(monkeypatch, name):
    """Of that kind CPU tensors are taken to be; nothing is kept from before, no gradients are recorded."""
    derived.refresh()
    monkeypatch.setattr(runners, "DEVICES", {"cpu": DEVICES[name]})
    Fake.captures = Fake.replays = Fake.renewals = 0
    with torch.no_grad():
        yield
    derived.refresh()


def runner_of(model=None, *args, **kwargs):
    Fake.model = (Model() if model is None else model).eval()
    return graphed(Fake.model, *args, **kwargs)


def assert_same(runner, *args, captures=None, **kwargs):
    """The same bits as the model's, by a replay if captures are given; which is how many there were."""
    replays = Fake.replays
    found, expected = runner(*args, **kwargs), runner.model(*args, **kwargs)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    if captures is not None:
        assert Fake.captures == captures
        assert Fake.replays > replays
    else:
        assert Fake.replays == replays, runner.explain()
    return found
