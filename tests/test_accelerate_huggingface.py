"""transformers' vision models after `accelerate`: the same numbers, from the fused ops."""

from collections import Counter

import pytest
import transformers
from huggingface_models import MODELS, build
from library_parity import BLOCK, assert_parity, events, pair

import fastvit


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, call = build(request.param)
    original, ours = pair(model)
    return request.param, original, ours, call


def test_every_layer_and_embedding_runs_on_the_ops(case):
    name, original, ours, call = case
    ran = Counter(events(ours, **call))
    layers = sum(type(module).__name__.endswith(("Layer", "EncoderLayer")) for module in original.modules())
    expected = Counter(dict.fromkeys(BLOCK, layers))
    if MODELS[name][2]:
        expected["patch_embed"] = 1
    assert ran == expected


def test_outputs_and_gradients_are_within_the_contract(case):
    name, original, ours, call = case
    _needs_an_oracle(name)
    assert_parity(original, ours, **call)


def _needs_an_oracle(name):
    if name == "clip" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 makes no masks of texts in float64")


# A class token, LayerScale, a gated MLP, two towers of which one is masked, RMSNorm.
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3 gated", "clip", "aimv2"])
def test_outputs_and_gradients_of_the_compiled_ops_are_too(name):
    _needs_an_oracle(name)
    model, call = build(name)
    original, ours = pair(model)
    with fastvit.use_backend("cpp"), fastvit.recording.recording() as recorder:
        assert_parity(original, ours, **call)
    halves = {event.backend for event in recorder.events if event.op not in ("attention", "patch_embed")}
    assert halves == {"cpp"}


# Rotary positions, tokens before the patches with and without positions, no such tokens, a mask: the kernels'
# options, on one image, because they are interpreted where there is no GPU.
@pytest.mark.parametrize("name", ["vit eager", "dinov2 with registers", "dinov3", "siglip"])
def test_outputs_and_gradients_of_the_kernels_are_too(name):
    model, call = build(name)
    original, ours = pair(model)
    call = {key: value[:1] for key, value in call.items()}
    with fastvit.use_backend("triton"), fastvit.recording.recording() as recorder:
        assert_parity(original, ours, **call)
    assert {event.backend for event in recorder.events if event.op in ("attention", "patch_embed")} == {
        "triton"
    }
