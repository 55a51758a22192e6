"""A graphed model gives what the model gives, and replays every kind of call that it has captured."""

import copy
import pickle
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from graph_fakes import DEVICES, Fake, Mixed, Model, Plain, X, assert_same, on_device, runner_of
from torch import nn

import fastvit
from fastvit import graphed


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    with on_device(monkeypatch, request.param):
        yield request.param


def test_a_call_is_captured_once_and_replayed():
    runner = runner_of()
    for i in range(3):
        assert_same(runner, X + i, captures=1)
    assert_same(runner, X[:1], captures=2)
    assert_same(runner, X.flip(0), captures=2)
    assert "[8, 3, 8, 8] float32: replayed 4 times" in runner.explain()


def test_two_results_can_be_kept():
    runner = runner_of()
    first = runner(X)
    before = first.clone()
    assert runner(-X).data_ptr() != first.data_ptr()
    assert torch.equal(first, before)


def test_without_clones_the_next_call_overwrites():
    runner = runner_of(clone=False)
    first = runner(X)
    before = first.clone()
    assert runner(-X).data_ptr() == first.data_ptr()
    assert not torch.equal(first, before)


KINDS = {
    "batch": X[:1],
    "image size": torch.randn(8, 12, 4, 4),
    "dtype": X.double(),
    "layout": X.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("other", KINDS.values(), ids=KINDS)
def test_each_kind_of_call_has_its_graph(other):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    assert_same(runner, other, captures=2)
    assert_same(runner, X, captures=2)
    assert_same(runner, other, captures=2)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, float16": lambda: torch.autocast("cpu", torch.float16),
    "use_backend": lambda: fastvit.use_backend("reference"),
    "use_backend, one op": lambda: fastvit.use_backend(attention="reference"),
    "sdpa": lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    "tf32": lambda: tf32(),
    "deterministic": lambda: torch.backends.cudnn.flags(deterministic=True),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_has_its_graph(setting):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    with setting():
        assert_same(runner, X, captures=2)
    assert_same(runner, X, captures=2)
    with setting():
        assert_same(runner, X, captures=2)


@contextmanager
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_casts_in_autocasts_cache_are_not_captured():
    seen = []

    class Asks(Plain):
        def forward(self, x):
            seen.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    runner = runner_of(Asks())
    with torch.autocast("cpu", torch.bfloat16):
        runner.capture(X)
        assert torch.is_autocast_cache_enabled()
    assert Fake.captures == 2
    assert not any(seen)


LAYOUTS = {
    "channels last": X.to(memory_format=torch.channels_last),
    "a crop": torch.randn(8, 3, 12, 12)[:, :, 2:10, 1:9],
    "expanded": X[:1].expand(8, -1, -1, -1),
    "one image": torch.randn(8, 8, 3).permute(2, 0, 1)[None],  # whose batch has the stride of a pixel
}
ORDERS = {"channels last": (0, 2, 3, 1), "one image": (0, 2, 3, 1)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_layouts(name):
    class Strides(Plain):
        def forward(self, x):
            strides.append(x.stride())
            return super().forward(x)

    strides, x = [], LAYOUTS[name]
    runner = runner_of(Strides())
    runner(x)
    order = ORDERS.get(name, (0, 1, 2, 3))
    expected = torch.empty_permuted(x.shape, order).stride()
    assert set(strides) == {expected}
    assert_same(runner, x, captures=1)


def test_padding_runs_the_next_larger_size_and_cuts():
    runner = runner_of(batch_sizes=(1, 4, 8), pad=True)
    for batch, captures in [(7, 1), (2, 2), (5, 2), (3, 2), (8, 2), (1, 3)]:
        found = runner(X[:batch])
        assert found.shape == (batch, 4)
        torch.testing.assert_close(found, runner.model(X[:batch]))
        assert Fake.captures == captures
    assert_same(runner, torch.cat([X, X]))
    assert "batch of 16" in runner.explain()


def test_padding_rows_are_zeros():
    class Rows(nn.Module):
        def forward(self, x):
            return {"rows": x + 1, "sum": x.sum()}

    runner = runner_of(Rows(), pad=True)
    for batch in (8, 3, 5, 2):
        found = runner(X[:batch])
        assert torch.equal(found["rows"], X[:batch] + 1)
        torch.testing.assert_close(found["sum"], X[:batch].sum())
    assert Fake.captures == 1


def test_without_padding_other_batches_run_eagerly():
    runner = runner_of()
    for batch in (2, 7, 0):
        assert_same(runner, X[:batch])
        assert f"batch of {batch}" in runner.explain()
    assert Fake.captures == 0


def test_capture_takes_the_largest_first_and_any_example():
    runner = runner_of(batch_sizes=(1, 8, 2))
    assert runner.capture(X[:3]) is runner
    assert Fake.captures == 3
    lines = runner.explain().splitlines()[1:]
    assert [line.split("[")[1][0] for line in lines] == ["8", "2", "1"]
    assert_same(runner, X, captures=3)
    assert_same(runner, X[:2], captures=3)


def test_capture_needs_no_no_grad():
    with torch.enable_grad():
        runner_of().capture(X)
    assert Fake.captures == 2


def test_pytrees_in_and_out():
    runner, mask = runner_of(Mixed()), torch.rand(8, 4)
    assert_same(runner, X, 2.0, mask=mask, extra=[mask[:, 0]], captures=1)
    assert_same(runner, -X, 2.0, mask=1 - mask, extra=[mask[:, 1]], captures=1)
    assert_same(runner, X, 3.0, mask=mask, extra=[mask[:, 0]], captures=2)
    assert_same(runner, X, True, mask=mask, extra=[mask[:, 0]], captures=3)
    assert_same(runner, X, 1, mask=mask, extra=[mask[:, 0]], captures=4)
    assert_same(runner, x=X, name="a", captures=5)
    assert_same(runner, x=X, name="b", captures=6)


def test_padding_of_several_tensors():
    runner = runner_of(Mixed(), pad=True)
    for mask in (torch.rand(3, 4), torch.rand(1, 4), torch.rand(4)):  # of each sample its own, and of all
        found, expected = runner(X[:3], mask=mask), runner.model(X[:3], mask=mask)
        assert found["x"].shape == (3, 4)
        torch.testing.assert_close(found["x"], expected["x"])
        torch.testing.assert_close(found["rest"][0], expected["rest"][0])
    assert Fake.captures == 3


def test_an_argument_that_can_be_edited_runs_eagerly():
    runner = runner_of(Mixed())
    assert_same(runner, X, extra=[bytearray(b"a")])
    assert "bytearray" in runner.explain()


def test_hugging_face_outputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Tower(Plain):
        def forward(self, x):
            x = super().forward(x)
            return outputs.BaseModelOutputWithPooling(last_hidden_state=x[:, None], pooler_output=x)

    runner = runner_of(Tower())
    found = assert_same(runner, X, captures=1)
    assert isinstance(found, outputs.BaseModelOutputWithPooling)
    assert found.hidden_states is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_begin_without_graphs(copied):
    runner = runner_of(batch_sizes=(8, 2), pad=True, clone=False)
    assert_same(runner, X, captures=1)
    other = copied(runner)
    assert (other.batch_sizes, other.pad, other.clone) == ((2, 8), True, False)
    assert "replayed" not in other.explain()
    Fake.model = other.model
    assert_same(other, X, captures=2)
    Fake.model = runner.model
    assert_same(runner, X, captures=2)


def test_reset_frees():
    runner = runner_of()
    assert_same(runner, X, captures=1)
    runner.reset()
    assert "replayed" not in runner.explain()
    assert_same(runner, X, captures=2)


def test_threads():
    runner, results = runner_of(), {}

    @torch.no_grad()
    def work(i):
        results[i] = [runner(X + i) for _ in range(20)]

    threads = [threading.Thread(target=partial(work, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Fake.captures == 1
    for i, found in results.items():
        assert all(torch.equal(each, runner.model(X + i)) for each in found)


def test_a_runner_in_a_model_that_is_run_by_a_runner():
    inner = runner_of(Plain())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = inner.model

        def forward(self, x):
            return inner(x) + 1

    outer = graphed(Outer().eval())
    done = threading.Thread(target=torch.no_grad()(lambda: outer(X)), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()


@pytest.mark.parametrize("sizes", [(), 8, (0,), (1, -8), (1.0,), ("8",), (True,)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match=r"graphed: batch_sizes must be positive ints"):
        graphed(Model(), sizes)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"graphed: the model is a function; pass a torch\.nn\.Module"):
        graphed(lambda x: x)
    with pytest.raises(TypeError, match="scripted"):
        graphed(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
