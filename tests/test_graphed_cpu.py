"""A graphed model on a CPU: what a replay reads, edits, holds and gives back."""

import copy
import gc
import threading

import pytest
import torch
from accelerated import images, pair
from cpu_graphs import assert_same, replays, runner_of
from graph_fakes import Plain, X
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastvit
from fastvit import graph_cpu


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "auto"), (torch.bfloat16, "cpp"), (torch.float16, "auto")]
)
def test_autocast(dtype, backend):
    _, fast = pair(mode="inference")
    runner = runner_of(fast, batch_sizes=(3,))
    with torch.autocast("cpu", dtype), fastvit.use_backend(backend):
        assert_same(runner, images())
        assert_same(runner, images(seed=1))


def test_what_autocast_leaves_alone_is_left_alone():
    class Island(Plain):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.embed(x.flatten(1))
            return self.head(x)

    runner = runner_of(Island())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(runner, X)
    assert_same(runner, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    _, fast = pair(mode="inference")
    assert_same(runner_of(fast.to(dtype), batch_sizes=(3,)), images().to(dtype))


@pytest.mark.parametrize("packing", ["panels", "oneDNN"])
def test_packed_weights_follow_in_place(packing, monkeypatch):
    from fastvit import native_backend

    monkeypatch.setattr(native_backend, "vectors", lambda: "AVX2" if packing == "panels" else "AVX512")
    _, fast = pair(mode="inference")
    fastvit.refresh()
    runner = runner_of(fast, batch_sizes=(3,))
    with fastvit.use_backend("cpp"):
        first = assert_same(runner, images())
        bucket = next(iter(runner._buckets.values()))
        for block in fast.blocks:
            block.mlp.fc2.weight.mul_(1.5)
            block.ls1.gamma.add_(0.1)
        assert not torch.equal(assert_same(runner, images()), first)
        assert next(iter(runner._buckets.values())) is bucket
    fastvit.refresh()


def test_no_module_runs_in_a_replay():
    runs = []

    class Counts(Plain):
        def forward(self, x):
            runs.append(x)
            return super().forward(x)

    runner = runner_of(Counts())
    runner(X)
    runs.clear()
    runner(-X)
    assert not runs


def test_torchs_encoder_with_a_mask():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    runner, x = runner_of(nn.TransformerEncoder(layer, 2)), torch.randn(8, 6, 16)
    assert_same(runner, x)
    mask = torch.zeros(8, 6, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="tells Python something of a tensor's numbers"):
        runner(x, src_key_padding_mask=mask)
    mask[0, :2] = True
    assert torch.equal(runner(x, src_key_padding_mask=mask), runner.model(x, src_key_padding_mask=mask))


def test_a_tensor_that_the_model_makes_and_edits():
    class Counts(nn.Module):
        def forward(self, x):
            count = torch.tensor(0.0)
            count += (x > 3).sum()
            return x, count

    runner = runner_of(Counts())
    for x in (X, X + 3, X + 3):
        assert_same(runner, x)


def test_what_a_runner_held_is_free_at_once():
    runner = runner_of(Plain())
    gc.collect()
    gc.disable()
    try:
        runner(X)
        old = StorageWeakRef(runner.model.head.weight.untyped_storage())
        runner.model.head.weight = nn.Parameter(torch.randn(4, 6))
        assert not old.expired()
        runner.reset()
        assert old.expired()
    finally:
        gc.enable()


def test_a_tensor_at_the_address_of_one_that_is_gone():
    recorder, other = graph_cpu.Recorder([X]), torch.ones(3)
    with recorder:
        gone = X + 1
        recorder._known[id(other)] = recorder._known[id(gone)]
        del gone
        out = other + 1
    assert torch.equal(recorder.program([out])(X)[0], out)


def test_inputs_that_are_edited_and_given_back():
    class Edits(nn.Module):
        def forward(self, x):
            return x.mul_(2), x.sum(), (x[:, :1] + 1).expand(-1, 5, -1, -1), self.table

    model = Edits()
    model.table = nn.Parameter(torch.randn(3))
    runner, x = runner_of(model), X.clone()
    for i in range(3):
        found, expected = runner(x + i), model(x + i)
        assert all(map(torch.equal, found, expected))
    assert torch.equal(x, X)
    assert replays(runner) == 3


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.inference_mode])
def test_results_are_the_callers_own(gradients):
    runner = runner_of(Plain())
    with gradients():
        first = runner(X)
        before = first.clone()
        runner(-X)
        assert torch.equal(first, before)
        assert first.is_inference() == torch.is_inference_mode_enabled()


def test_copies_of_a_runner_compute_side_by_side():
    runner, results = runner_of(Plain()), {}

    @torch.no_grad()
    def work(i):
        own = copy.copy(runner)
        results[i] = [own(X + i) for _ in range(20)], own

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (found, own) in results.items():
        assert own.model is runner.model
        assert replays(own) == 20
        assert all(torch.equal(each, runner.model(X + i)) for each in found)


def test_a_models_memory_is_not_copied():
    model = Plain().eval()
    runner = runner_of(model)
    runner(X)
    weights = {t.data_ptr() for t in (model.embed.weight, model.head.weight, model.norm.running_mean)}
    (bucket,) = runner._buckets.values()
    assert weights <= {tensor.data_ptr() for tensor in bucket._graph._program.constants}


def test_only_what_is_needed_is_run_again():
    class Wasteful(Plain):
        def forward(self, x):
            torch.nn.functional.gelu(self.gamma)
            return super().forward(x)

    model, recorder = Wasteful().eval(), graph_cpu.Recorder([X])
    with recorder:
        out = model(X)
    program = recorder.program([out])
    assert "gelu" not in program.code.__code__.co_names
    assert "addmm" in program.code.__code__.co_names
    assert model.gamma.data_ptr() not in {tensor.data_ptr() for tensor in program.constants}
    assert torch.equal(program(X)[0], out)
