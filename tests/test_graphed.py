"""A graphed model gives what the model gives, and replays every kind of call that it has captured."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from graph_fakes import DEVICES, Fake, Mixed, Model, Plain, X, assert_same, on_device, runner_of
from torch import nn

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


def test_padding_rows_are_zeros_again_where_the_model_edits_them():
    class Edits(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x - x.sum(0)

    runner = runner_of(Edits(), pad=True)
    first = runner(X[:3])
    for _ in range(3):
        assert torch.equal(runner(X[:3]), first)


def test_inputs_that_get_another_shape():
    class Squeezes(nn.Module):
        def forward(self, x):
            return x.squeeze_(1).sum(-1)

    runner, x = runner_of(Squeezes()), torch.randn(8, 1, 3)
    for _ in range(3):
        assert torch.equal(runner(x.clone()), x[:, 0].sum(-1))


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


def test_two_threads_capture_models_that_share_a_runner():
    inner, entered, waited = runner_of(Plain()), threading.Event(), threading.Event()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = inner.model

        def forward(self, x):
            entered.set()
            waited.wait(1)
            return inner(x) + 1

    outer = graphed(Outer().eval())
    Fake.model = outer.model
    first = threading.Thread(target=torch.no_grad()(lambda: outer(X)), daemon=True)
    second = threading.Thread(target=torch.no_grad()(lambda: inner(X)), daemon=True)
    first.start()
    assert entered.wait(10)
    second.start()
    first.join(30), second.join(30)
    assert not first.is_alive()
    assert not second.is_alive()


@pytest.mark.parametrize("sizes", [(), 8, (0,), (1, -8), (1.0,), ("8",), (True,)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match=r"graphed: batch_sizes must be positive ints"):
        graphed(Model(), sizes)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"graphed: the model is a function; pass a torch\.nn\.Module"):
        graphed(lambda x: x)
    with pytest.raises(TypeError, match="scripted"):
        graphed(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
