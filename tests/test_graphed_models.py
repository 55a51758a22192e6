"""A graphed model on a CPU: the same bits by the ops that it came down to, of every library's models."""

import warnings
from contextlib import nullcontext

import huggingface_models
import pytest
import timm
import torch
from accelerated import images, pair
from cpu_graphs import assert_same, replays, runner_of
from library_models import open_clip_model, torchvision_model

import fastvit


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
