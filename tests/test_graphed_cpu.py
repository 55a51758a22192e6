"""A graphed model on a CPU: the same bits by the ops that it came down to, of every library's models."""

import copy
import ctypes
import threading
import warnings
from contextlib import nullcontext

import huggingface_models
import pytest
import timm
import torch
from accelerated import images, pair
from graph_fakes import Plain, X
from library_models import open_clip_model, torchvision_model
from torch import nn
from torch.utils._pytree import tree_leaves

import fastvit
from fastvit import graph_cpu, graphed


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def timm_model(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    return model, {"x": torch.randn(2, *model.default_cfg["input_size"])}


MODELS = {
    **{
        f"transformers {name}": lambda name=name: huggingface_models.build(name)
        for name in huggingface_models.MODELS
    },
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
    "timm vit": lambda: (pair()[0], {"x": images()}),
    "timm eva": lambda: (pair("eva")[0], {"x": images()}),
    "timm swin": lambda: timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "timm convnext": lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1)),
}
# What reads numbers of its arguments in Python.
READERS = {
    "transformers clip": "_local_scalar_dense",
    "transformers siglip": "_local_scalar_dense",
    "transformers siglip2": "tolist",
}
RUNS = {
    "original": nullcontext,
    "auto": nullcontext,
    "cpp": lambda: fastvit.use_backend("cpp"),
}


def replays(runner):
    return sum(bucket.replays for bucket in runner._buckets.values())


def assert_same(runner, *args, **kwargs):
    """The model's bits, by a replay."""
    before = replays(runner)
    found, expected = runner(*args, **kwargs), runner.model(*args, **kwargs)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert replays(runner) > before, runner.explain()
    return found


def runner_of(model, *args, **kwargs):
    return graphed(model.eval(), *args, **kwargs)


def others(inputs):
    """Other numbers of the kind of each of these."""
    return {name: t * 0.7 if t.is_floating_point() else t.flip(0) for name, t in inputs.items()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_the_model(name, run):
    model, inputs = MODELS[name]()
    if run != "original":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models of which nothing is replaced
            fastvit.accelerate(model, mode="inference")
    runner = runner_of(model, batch_sizes=(len(next(iter(inputs.values()))),))
    with RUNS[run]():
        if name in READERS:
            with pytest.warns(RuntimeWarning, match=READERS[name]):
                runner(**inputs)
            assert replays(runner) == 0
            return
        assert_same(runner, **inputs)
        assert_same(runner, **others(inputs))
        assert_same(runner, **inputs)


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


def test_what_draws_numbers_runs_eagerly():
    class Draws(Plain):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    runner = runner_of(Draws())
    with pytest.warns(RuntimeWarning, match="a replay gives other numbers"):
        runner(X)
    assert replays(runner) == 0


@pytest.mark.parametrize("x", [X, torch.ones(8, 3, 8, 8), torch.arange(8)], ids=["images", "ones", "ids"])
def test_what_is_computed_outside_of_torch_is_found_out(x):
    class Outside(nn.Module):
        def forward(self, x):
            y = x * 2.0
            return y + ctypes.c_float.from_address(y.data_ptr()).value

    with pytest.warns(RuntimeWarning, match="a replay gives other numbers"):
        runner_of(Outside())(x)


def test_a_tensor_at_the_address_of_one_that_is_gone():
    recorder, other = graph_cpu._Recorder([X]), torch.ones(3)
    with recorder:
        gone = X + 1
        recorder._known[id(other)] = recorder._known[id(gone)]
        del gone
        out = other + 1
    assert torch.equal(recorder.code([out])(X)[0], out)


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
    constants = {t.data_ptr() for t in tree_leaves(vars(bucket._graph._code.__self__)["_buffers"])}
    assert weights <= constants


def test_only_what_is_needed_is_run_again():
    class Wasteful(Plain):
        def forward(self, x):
            torch.nn.functional.gelu(x)
            return super().forward(x)

    model, recorder = Wasteful().eval(), graph_cpu._Recorder([X])
    with recorder:
        out = model(X)
    code = recorder.code([out])
    assert "gelu" not in code.__self__.code
    assert torch.equal(code(X)[0], out)
