"""What no graph can stand for runs as the model itself, with a reason, and costs none of the graphs."""

import pytest
import torch
from graph_fakes import DEVICES, Fake, Plain, X, assert_same, on_device, runner_of, runners
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit import recording
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


OTHERS = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x[:, 0, 0].to_sparse_csr(),
    "nested": lambda x: torch.nested.as_nested_tensor([x[0, 0], x[0, 0, :3]]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_inputs_of_other_layouts(make):
    class Given(nn.Module):
        def forward(self, x):
            return x.shape[0] if x.layout == torch.strided and not x.is_nested else x.layout

    x, runner = make(X), runner_of(Given(), batch_sizes=(2, 8))
    assert runner(x) == runner.model(x)
    assert "laid out as" in runner.explain()


def test_weights_of_other_layouts():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.weight, x)

    runner, x = runner_of(Sparse()), torch.randn(8, 4)
    assert torch.equal(runner(x), runner.model(x))
    assert "a parameter is" in runner.explain()


def test_a_tensor_that_is_given_twice():
    class Edits(nn.Module):
        def forward(self, a, b):
            a.mul_(2)
            return a + b

    runner = runner_of(Edits())
    y, z = X.clone(), X.clone()
    assert torch.equal(runner(y, y), runner.model(z, z))
    assert "the same tensor" in runner.explain()
    y, z = X.clone(), X.clone()
    assert torch.equal(runner(y, z), runner.model(X.clone(), X))


def test_an_error_of_the_model_is_the_callers():
    runner = runner_of()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            runner(torch.randn(8, 3, 9, 9))
    assert Fake.captures == 0
    assert_same(runner, X, captures=1)
