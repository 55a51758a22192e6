"""What no graph can hold: it is warned of once, and runs as the model itself from then on."""

import warnings

import pytest
import torch
from graph_fakes import DEVICES, Fake, Plain, X, on_device, runner_of, runners

from fastvit import graph_trial


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    with on_device(monkeypatch, request.param):
        yield request.param


class Syncs(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x * (2 if x.sum().item() > 0 else 3)


class Catches(Plain):
    """What tells that no graph can hold it is no error of its own."""

    def forward(self, x):
        try:
            most = x.max().item()
        except Exception:
            most = 0.0
        return super().forward(x) * most


class Masks(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x[x > 0]


class Sends(Plain):
    def forward(self, x):
        x.to("meta")
        return super().forward(x)


class Raises(Plain):
    """Where a capture breaks, as at a call of CUDA that none allows."""

    def forward(self, x):
        if Fake.capturing:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return super().forward(x)


class Opaque:
    def __init__(self, x):
        self.x = x


class Returns(Plain):
    def forward(self, x):
        return Opaque(super().forward(x))


class Rebuilds(Plain):
    def forward(self, x):
        self.norm.running_mean = self.norm.running_mean.clone()
        return super().forward(x)


UNCAPTURABLE = {
    Syncs: ("_local_scalar_dense", 0),
    Catches: ("_local_scalar_dense", 0),
    Masks: ("index.Tensor", 0),
    Sends: ("_to_copy", 0),
    Raises: ("RuntimeError: operation not permitted", 1),
    Returns: ("Opaque", 1),
    Rebuilds: ("replaces", 1),
}


@pytest.mark.parametrize("layer", UNCAPTURABLE, ids=lambda layer: layer.__name__)
def test_what_no_graph_can_hold_runs_eagerly_from_then_on(layer, device):
    reason, captures = UNCAPTURABLE[layer]
    runner = runner_of(layer())
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        runner(X)
    assert caught[0].filename == __file__
    # A CPU's recorder finds out by itself what a trial shows of a GPU.
    assert Fake.captures == captures or device == "CPU"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fake.captures = 0
        for _ in range(2):
            found, expected = runner(X), runner.model(X)
            assert torch.equal(getattr(found, "x", found), getattr(expected, "x", expected))
    assert Fake.captures == 0
    assert reason in runner.explain()


def test_indices_and_cpu_scalars_are_no_reason():
    class Indexes(Plain):
        def forward(self, x):
            scale = torch.ones(()).item()
            return super().forward(x)[:, torch.tensor([1, 0])] * scale

    assert graph_trial.reads(torch.ops.aten.index.Tensor, (X, [torch.tensor([1, 0])])) is False
    assert graph_trial.reads(torch.ops.aten.index.Tensor, (X, [X > 0])) is True
    with graph_trial.Ops("cuda"):
        Indexes()(X)


def test_kinds_of_calls_that_are_refused_are_limited(monkeypatch):
    monkeypatch.setattr(runners, "MOST_BUCKETS", 3)

    class Reads(Plain):
        def forward(self, x, scale):
            return super().forward(x) * scale + x.sum().item()

    runner = runner_of(Reads())
    with pytest.warns(RuntimeWarning) as caught:
        for i in range(9):
            runner(X, float(i))
    assert len(caught) == 3


def test_tensors_from_caches_are_held(device):
    class Caches(Plain):
        def forward(self, x):
            if getattr(self, "table", None) is None or len(self.table) != x.shape[-1]:
                self.__dict__["table"] = torch.arange(x.shape[-1])
            return x * self.table

    runner = runner_of(Caches())
    runner(X)
    table = runner.model.table
    memory = table.untyped_storage()._cdata
    runner(torch.randn(8, 3, 4, 4))
    (first, _) = runner._buckets.values()
    held = first._graph.graph._program.constants if device == "CPU" else first._outside
    assert memory in [tensor.untyped_storage()._cdata for tensor in held]
