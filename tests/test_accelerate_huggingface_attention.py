"""`attn_implementation="fastvit"`: transformers' models on fastvit's attention, masks included."""

import copy

import pytest
import torch
import transformers as hf
from huggingface_models import BOTH, MLP, TEXT, WORDS, build
from library_parity import assert_parity, events, images, pair, reasons, same

import fastvit
from fastvit.verification import randomize

X = images(batch=2)
MASK = torch.ones(2, 17, dtype=torch.long).index_fill(1, torch.arange(14, 17), 0)
LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def _registered():
    fastvit.register_hf()
    fastvit.register_hf()


def on_fastvit(model):
    """A copy whose attention is fastvit's, nothing else."""
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("fastvit")
    return ours


@pytest.fixture(scope="module")
def vits():
    torch.manual_seed(0)
    original = randomize(hf.ViTModel(hf.ViTConfig(**MLP))).eval()
    return original, on_fastvit(original)


@pytest.mark.parametrize("mask", [None, MASK, (torch.arange(17) < 9).expand(2, 1, 17, 17)])
def test_outputs_and_gradients_are_those_of_sdpa(vits, mask):
    original, ours = vits
    assert events(ours, X, attention_mask=mask) == ["attention"] * LAYERS
    assert_parity(original, ours, pixel_values=X, attention_mask=mask)


def test_a_mask_is_not_dropped(vits):
    _, ours = vits
    assert not torch.allclose(ours(X, attention_mask=MASK)[0], ours(X)[0])


def test_it_can_be_chosen_as_the_model_is_made(vits):
    original, _ = vits
    model = hf.ViTModel(hf.ViTConfig(**MLP, attn_implementation="fastvit")).eval()
    model.load_state_dict(original.state_dict())
    assert events(model, X) == ["attention"] * LAYERS
    same(model(X), original(X))


def test_texts_are_causal_and_padded():
    original = randomize(build("clip")[0]).eval()
    ours = on_fastvit(original)
    assert events(ours, **BOTH) == ["attention"] * 2 * LAYERS
    same(ours(**BOTH), original(**BOTH))
    same(ours.text_model(WORDS), original.text_model(WORDS))


# Fewer heads of keys than of queries, and keys of earlier calls: neither is the op's business.
def test_decoders_run_on_sdpa():
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=1)
    original = randomize(hf.LlamaForCausalLM(config)).eval()
    ours = on_fastvit(original)
    assert events(ours, WORDS) == []
    same(ours(WORDS).logits, original(WORDS).logits)
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(ours.generate(WORDS[:, :3], **call), original.generate(WORDS[:, :3], **call))


def test_dropout_draws_what_sdpa_draws():
    torch.manual_seed(0)
    original = randomize(hf.ViTModel(hf.ViTConfig(**MLP, attention_probs_dropout_prob=0.4))).train()
    outputs = []
    for model in (original, on_fastvit(original)):
        torch.manual_seed(7)
        outputs.append(model(X)[0])
    same(*outputs)


def test_accelerated_models_keep_their_fused_blocks(vits):
    original, _ = vits
    _, ours = pair(copy.deepcopy(original))
    ours.set_attn_implementation("fastvit")
    assert not reasons(ours, X, attention_mask=MASK)
    same(ours(X, attention_mask=MASK), original(X, attention_mask=MASK))


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_kernels_serve_it(vits, mask):
    original, ours = vits
    with fastvit.use_backend("triton"), fastvit.recording.recording() as recorder:
        assert_parity(original, ours, pixel_values=X, attention_mask=mask)
    assert {event.backend for event in recorder.events} == {"triton"}
