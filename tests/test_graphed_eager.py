"""What no graph can stand for runs as the model itself, with a reason, and costs none of the graphs."""

import warnings

import numpy as np
import pytest
import torch
from graph_fakes import DEVICES, Fake, Plain, X, assert_same, on_device, runner_of, runners
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit import graph_trial, recording
from fastvit.layers import plain


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    with on_device(monkeypatch, request.param):
        yield request.param


def test_gradients():
    runner = runner_of()
    with torch.enable_grad():
        out = runner(X)
        assert out.requires_grad
        assert "no_grad" in runner.explain()
        runner.model.requires_grad_(False)
        assert_same(runner, X, captures=1)
        assert runner(X.clone().requires_grad_()).requires_grad
    assert Fake.captures == 1


def test_training():
    runner = runner_of()
    assert_same(runner, X, captures=1)
    runner.model.train()
    assert torch.equal(runner(X), runner.model(X))  # of the batch's own statistics
    assert "training" in runner.explain()
    runner.model.eval()
    runner(X)  # running_mean has changed in place
    assert_same(runner, X, captures=1)


def test_a_module_in_training():
    runner = runner_of()
    assert_same(runner, X, captures=1)
    runner.model.norm.train()
    assert torch.equal(runner(X), runner.model(X))
    assert "training" in runner.explain()
    other = runner_of(Plain())
    other.model.norm.train()
    assert torch.equal(other(X), other.model(X))
    assert Fake.captures == 1


HOOKS = {
    "forward": lambda m: m.norm.register_forward_hook(lambda module, args, out: out + 1),
    "before forward": lambda m: m.head.register_forward_pre_hook(lambda *_: None),
    "on the model": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "everywhere": lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_run_and_cost_no_capture(hook):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    handle = hook(runner.model)
    assert torch.equal(runner(X), runner.model(X))
    assert "hook" in runner.explain()
    assert_same(runner, X[:1])
    handle.remove()
    assert_same(runner, X, captures=1)


def test_idle_hooks_do_not_matter(monkeypatch):
    def idle(module, args, out):
        return None

    runner = runner_of()
    runner.model.norm.register_forward_hook(idle)
    assert_same(runner, X)
    monkeypatch.setattr(plain, "IDLE_HOOKS", plain.IDLE_HOOKS)
    plain.IDLE_HOOKS.append(lambda hook: hook is idle)
    try:
        assert_same(runner, X, captures=1)
    finally:
        plain.IDLE_HOOKS.pop()


def test_a_function_or_dispatch_mode_sees_the_model():
    class Counts(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Counts.count += 1
            return function(*args, **kwargs or {})

    runner = runner_of()
    assert_same(runner, X, captures=1)
    with Counts():
        assert_same(runner, X)
    assert Counts.count > 4
    with FlopCounterMode(display=False) as flops:
        runner(X)
    assert flops.get_total_flops() > 0
    with torch.device("cpu"):
        assert_same(runner, X, captures=1)


def test_fake_tensors_subclasses_and_transforms():
    class Own(Tensor):
        pass

    runner = runner_of()
    assert type(runner(X.as_subclass(Own))) is Own
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert runner(torch.empty(8, 3, 8, 8)).shape == (8, 4)
    torch.testing.assert_close(torch.func.vmap(runner)(X[None])[0], runner.model(X))
    assert Fake.captures == 0


def test_parameters_of_another_type():
    class Own(Tensor):
        pass

    runner = runner_of(Plain())
    runner.model.head.weight = nn.Parameter(runner.model.head.weight.data.as_subclass(Own))
    runner(X)
    assert Fake.captures == 0
    assert "parameter" in runner.explain()


def test_recorded_traced_and_compiled_calls_run_the_model():
    runner = runner_of(Plain())
    with recording.recording():
        assert_same(runner, X)
    graph = make_fx(runner)(X)
    assert torch.equal(graph(-X), runner.model(-X))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: runner(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), runner.model(X) + 1)
    assert Fake.captures == 0


def test_inside_another_capture(monkeypatch):
    runner = runner_of()
    monkeypatch.setattr(Fake, "capturing", True)
    assert_same(runner, X)


def test_another_device_runs_eagerly(monkeypatch):
    monkeypatch.setattr(runners, "DEVICES", {"cuda": Fake})
    runner = runner_of()
    assert_same(runner, X)
    assert_same(runner.capture(X), X)
    assert "on cpu" in runner.explain()


class Syncs(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x * (2 if x.sum().item() > 0 else 3)


class Lists(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x * max(x[0].tolist())


class Numpy(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x + float(np.asarray(x).max()) + float(x.numpy().max())


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
    Lists: ("tolist", 0),
    Numpy: ("__array__", 0),
    Masks: ("index.Tensor", 0),
    Sends: ("_to_copy", 0),
    Raises: ("RuntimeError: operation not permitted", 1),
    Returns: ("Opaque", 1),
    Rebuilds: ("replaces", 1),
}


@pytest.mark.parametrize("layer", UNCAPTURABLE, ids=lambda layer: layer.__name__)
def test_what_no_graph_can_hold_runs_eagerly_from_then_on(layer):
    reason, captures = UNCAPTURABLE[layer]
    runner = runner_of(layer())
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        runner(X)
    assert caught[0].filename == __file__
    assert Fake.captures == captures
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

    assert graph_trial._waits(torch.ops.aten.index.Tensor, (X, [torch.tensor([1, 0])]), []) is False
    assert graph_trial._waits(torch.ops.aten.index.Tensor, (X, [X > 0]), []) is True
    trial = graph_trial._Ops("cuda", [])
    with trial:
        Indexes()(X)


def test_an_error_of_the_model_is_the_callers():
    runner = runner_of()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            runner(torch.randn(8, 3, 9, 9))
    assert Fake.captures == 0
    assert_same(runner, X, captures=1)


def test_tensors_from_caches_are_held():
    class Caches(Plain):
        def forward(self, x):
            if getattr(self, "table", None) is None or len(self.table) != x.shape[-1]:
                self.__dict__["table"] = torch.arange(x.shape[-1])
            return x * self.table

    runner = runner_of(Caches())
    runner(X)
    memory = runner.model.table.untyped_storage()._cdata
    runner(torch.randn(8, 3, 4, 4))
    (first, _) = runner._buckets.values()
    assert memory in [tensor.untyped_storage()._cdata for tensor in first._outside]
