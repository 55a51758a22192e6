"""torchvision's VisionTransformer after `accelerate`: the same numbers, from the ops or its own forward."""

import copy
from functools import partial

import pytest
import torch
from library_models import torchvision_model
from library_parity import BLOCK, assert_parity, events, images, pair, reasons, same
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import ConvStemConfig

import fastvit

FUSED = ["patch_embed", *BLOCK * 2]
X = images(batch=2)


@pytest.fixture(scope="module")
def models():
    return pair(torchvision_model()[0])


@pytest.fixture
def fresh(models):
    """The same, to be changed."""
    return copy.deepcopy(models)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "cpp"),
        ({"representation_size": 48}, "auto"),
        ({"norm_layer": partial(nn.LayerNorm, eps=1e-3), "num_heads": 4}, "auto"),
    ],
)
def test_outputs_and_gradients_are_within_the_contract(options, backend):
    model, call = torchvision_model(**options)
    original, ours = pair(model)
    assert events(ours, **call) == FUSED
    with fastvit.use_backend(backend):
        assert_parity(original, ours, **call)


# torch has a fast path of its own for attention without gradients: it is not ours to be measured by, but to
# agree with.
def test_it_agrees_with_the_original_without_gradients(models):
    original, ours = models
    with torch.no_grad():
        same(ours(X), original(X))


def test_a_conv_stem_stays_as_it_is():
    stem = [ConvStemConfig(16, 3, 2), ConvStemConfig(16, 3, 4)]
    original, ours = pair(torchvision_model(conv_stem_configs=stem)[0])
    stem_reason = "conv_proj is a torch.nn.modules.container.Sequential"
    assert events(ours, X) == [stem_reason, *BLOCK * 2]
    same(ours(X), original(X))


def test_the_parts_may_be_called_as_features_are_extracted(models):
    original, ours = models
    for model in models:
        model.tokens = model._process_input(X)
    same(ours.tokens, original.tokens)
    tokens = torch.cat([original.class_token.expand(2, -1, -1), original.tokens], dim=1)
    assert events(ours.encoder, tokens) == [*BLOCK * 2]
    same(ours.encoder(tokens), original.encoder(tokens))
    for model in models:
        del model.tokens


def test_torchvisions_feature_extractor_finds_what_it_finds_in_the_original(models):
    """It traces with torch.fx: every node of the original is there, and may be asked for."""
    nodes = ["encoder.layers.encoder_layer_0", "heads.head"]
    theirs, ours = (create_feature_extractor(model, return_nodes=nodes) for model in models)
    same(ours(X), theirs(X))
    assert ours.code == theirs.code


def test_wrong_images_fail_as_before(models):
    original, ours = models
    for wrong in (images(2, 48), images(2, channels=1), X[0], X.double()):
        with pytest.raises((AssertionError, ValueError, RuntimeError)) as theirs:
            original(wrong)
        with pytest.raises(type(theirs.value)) as found:
            ours(wrong)
        assert str(found.value) == str(theirs.value)


# A hook on the output projection of attention never fires in the original; on the attention it does.
def test_hooks_on_the_encoder_and_on_attention_fire(fresh):
    original, ours = fresh
    fired = []
    ours.encoder.register_forward_hook(lambda *_: fired.append("encoder"))
    block = ours.encoder.layers[1]
    block.self_attention.register_forward_hook(lambda *_: fired.append("attention"))
    assert reasons(ours, X) == {"encoder carries a hook", "self_attention carries a hook"}
    assert fired == ["attention", "encoder"]
    same(ours(X), original(X))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_first": False}, "self_attention takes the tokens before the batch"),
        ({"add_bias_kv": True}, "self_attention adds a key and a value of its own"),
        ({"add_zero_attn": True}, "self_attention adds a key and a value of its own"),
        ({"kdim": 64, "vdim": 64}, None),
    ],
)
def test_attention_of_another_make_runs_itself(fresh, change, reason):
    original, ours = fresh
    attention = nn.MultiheadAttention(64, 2, **{"batch_first": True} | change).eval()
    for model in fresh:
        model.encoder.layers[0].self_attention = copy.deepcopy(attention)
    assert reasons(ours, X) == ({reason} if reason else set())
    same(ours(X), original(X))


def test_more_layers_in_the_mlp_run(fresh):
    original, ours = fresh
    for model in fresh:
        model.encoder.layers[0].mlp.append(nn.Tanh())
    assert reasons(ours, X) == {"its MLP has more or fewer layers than two"}
    same(ours(X), original(X))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention_dropout": 0.3}, {*FUSED}),
        ({"dropout": 0.3}, {"patch_embed", "dropout drops activations (p = 0.3, in training)"}),
    ],
)
def test_training_draws_what_the_original_draws(options, expected):
    original, ours = (model.train() for model in pair(torchvision_model(**options)[0]))
    outputs = []
    for model, seed in ((original, 5), (ours, 5), (ours, 6)):
        torch.manual_seed(seed)
        outputs.append(model(X))
    same(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])
    assert {*events(ours, X)} == expected
