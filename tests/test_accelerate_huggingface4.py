"""What is otherwise in transformers 4: `make test-hf4` runs it, and tests/test_accelerate_huggingface.py."""

import copy

import pytest
import torch
import transformers as hf
from huggingface_models import BOTH, DINO, MLP, build
from library_parity import BLOCK, events, images, pair, reasons, same

import fastvit

pytestmark = pytest.mark.skipif(int(hf.__version__.partition(".")[0]) >= 5, reason="it is of transformers 4")
FUSED = ["patch_embed", *BLOCK * 2]
X = images(batch=2)


@pytest.fixture(scope="module", params=["vit eager", "dinov2", "clip vision"])
def models(request):
    return pair(build(request.param)[0])


def test_hidden_states_and_attention_weights(models):
    for model in models:
        model.config._attn_implementation = "eager"
    original, ours = models
    theirs = original(X, output_hidden_states=True)
    assert len(theirs.hidden_states) == 3
    same(ours(X, output_hidden_states=True), theirs)
    theirs = original(X, output_attentions=True)
    assert len(theirs.attentions) == 2
    assert reasons(ours, X, output_attentions=True)
    same(ours(X, output_attentions=True), theirs)
    assert events(ours, X) == FUSED


# The recording of outputs leaves on every layer its class's forward, which is not to outlive the class.
def test_outputs_recorded_before_and_after():
    record = {"output_attentions": True, "output_hidden_states": True}
    original, _ = pair(build("vit eager")[0])
    theirs = original(X, **record)
    assert "forward" in vars(original.encoder.layer[0])
    ours = fastvit.accelerate(copy.deepcopy(original))
    assert events(ours, X) == FUSED
    same(ours(X, **record), theirs)
    same(fastvit.restore(ours)(X, **record), theirs)
    assert events(ours, X) == []


@pytest.mark.parametrize("name", ["vit eager", "dinov2"])
def test_masks_of_heads_are_the_originals(name):
    original, ours = pair(build(name)[0])
    call = {"pixel_values": X, "head_mask": torch.tensor([1.0, 0.0])}
    assert reasons(ours, **call) == {"heads are masked"}
    same(ours(**call), original(**call))


def test_both_masks_of_a_text_are_added():
    original, ours = pair(build("clip")[0])
    assert not reasons(ours, **BOTH)
    call = {name: BOTH[name] for name in ("input_ids", "attention_mask")}
    same(ours.text_model(**call), original.text_model(**call))
    assert not torch.allclose(
        ours.text_model(**call)[0], ours.text_model(BOTH["input_ids"], torch.ones_like(BOTH["input_ids"]))[0]
    )


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, drop_path_rate=0.6)), True),
        (lambda: hf.ViTModel(hf.ViTConfig(**MLP, attention_probs_dropout_prob=0.3)), True),
        (lambda: hf.ViTModel(hf.ViTConfig(**MLP, hidden_dropout_prob=0.3)), False),
    ],
)
def test_training_draws_what_the_original_draws(make, fused):
    original, ours = (model.train() for model in pair(make()))
    outputs = []
    for model in (original, ours):
        torch.manual_seed(5)
        outputs.append(model(X)[0])
    same(*outputs)
    assert bool(reasons(ours, X)) != fused


def test_wrong_images_fail_as_before():
    original, ours = pair(build("vit")[0])
    for wrong in (images(2, 48), images(2, channels=4)):
        with pytest.raises(ValueError) as theirs:
            original(wrong)
        with pytest.raises(ValueError) as found:
            ours(wrong)
        assert str(found.value) == str(theirs.value)
