"""`attn_implementation="fastvit"` chosen at run time, and call by call the same as transformers' "sdpa".

After what transformers' own tests ask of "sdpa", as test_can_set_attention_dynamically does.
"""

import copy
import itertools

import pytest
import torch
import transformers as hf
from huggingface_models import BOTH, TEXT, WORDS, build
from library_parity import images, reasons, same
from test_explanation_composite import TOWERS
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastvit
from fastvit.accelerate.huggingface.attention import attention_forward
from fastvit.verification import randomize


@pytest.fixture(scope="module", autouse=True)
def _registered():
    fastvit.register_hf()


def implementations(model):
    """Those of the model's configurations, nested as they are."""
    configs = [each.config for each in model.modules() if isinstance(each, PreTrainedModel)]
    return {config._attn_implementation for config in configs}


CALLS = {
    "clip": BOTH,
    "siglip": BOTH,
    "encoder decoder": {"pixel_values": images(2), "decoder_input_ids": WORDS[:2]},
    "paligemma": {"pixel_values": images(1), "input_ids": torch.tensor([[55] * 16 + [3, 4, 5]])},
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_set_at_run_time_on_every_part(name):
    torch.manual_seed(0)
    model = randomize(TOWERS[name][0]()).eval()
    outputs = {}
    for implementation in ("eager", "fastvit", "sdpa", "fastvit", "eager"):
        model.set_attn_implementation(implementation)
        assert implementations(model) == {implementation}
        outputs.setdefault(implementation, []).append(model(**CALLS[name])[0])
    same(outputs["fastvit"][0], outputs["sdpa"][0])
    assert torch.equal(*outputs["fastvit"])
    assert torch.equal(*outputs["eager"])
    model.set_attn_implementation("fastvit")
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("foo")
    assert implementations(model) == {"fastvit"}


def test_one_tower_may_have_it():
    model = randomize(build("clip")[0]).eval()
    expected = model(**BOTH)
    model.set_attn_implementation({"vision_config": "fastvit", "text_config": "eager"})
    assert model.vision_model.config._attn_implementation == "fastvit"
    assert model.text_model.config._attn_implementation == "eager"
    same(model(**BOTH), expected)


def test_it_is_chosen_as_weights_are_loaded(tmp_path):
    model = randomize(build("clip")[0]).eval()
    model.save_pretrained(tmp_path)
    ours = hf.CLIPModel.from_pretrained(tmp_path, attn_implementation="fastvit").eval()
    assert implementations(ours) == {"fastvit"}
    same(ours(**BOTH), model(**BOTH))
    assert implementations(hf.CLIPModel.from_pretrained(tmp_path)) == {"sdpa"}


def test_accelerated_layers_follow_a_switch_at_run_time():
    model = randomize(build("vit")[0]).eval()
    ours = fastvit.accelerate(copy.deepcopy(model))
    for implementation in ("eager", "fastvit", "sdpa"):
        for each in (model, ours):
            each.set_attn_implementation(implementation)
        assert not reasons(ours, images(2))
        same(ours(images(2)), model(images(2)))


MASKS = (None, torch.rand(2, 1, 5, 5) > 0.4, torch.randn(2, 2, 5, 5), torch.randn(5, 5))


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize(
    ("query", "key", "value", "masks"),
    [
        ((2, 5, 8), (2, 5, 8), (2, 5, 8), MASKS),
        ((2, 1, 8), (2, 1, 8), (2, 1, 8), (None,)),
        ((2, 1, 8), (2, 5, 8), (2, 5, 8), (None,)),  # a token after others
        ((2, 5, 8), (2, 9, 8), (2, 9, 8), (None,)),  # a cache with room left
        ((4, 5, 8), (2, 5, 8), (2, 5, 8), (None, torch.rand(2, 1, 5, 5) > 0.4)),  # fewer heads of keys
        ((2, 5, 8), (2, 5, 8), (2, 5, 12), MASKS),  # values of another width
    ],
)
def test_every_call_gives_what_sdpa_gives(is_causal, query, key, value, masks):
    module = torch.nn.Module()
    module.num_key_value_groups = query[0] // key[0]
    q, k, v = (torch.randn(2, *shape) for shape in (query, key, value))
    for own, mask, scaling in itertools.product((True, False, None), masks, (None, 0.2)):
        if own is not None:
            module.is_causal = own
        given = {"scaling": scaling, "is_causal": is_causal, "num_items_in_batch": 3}
        ours, none = attention_forward(module, q, k, v, mask, **given)
        theirs, _ = sdpa_attention_forward(module, q, k, v, mask, **given)
        assert none is None
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)


def test_what_sdpa_adds_or_refuses():
    module = torch.nn.Module()
    q = torch.randn(1, 2, 5, 8)
    bias = {"position_bias": torch.randn(1, 2, 5, 5), "is_causal": True}
    ours, theirs = (f(module, q, q, q, None, **bias)[0] for f in (attention_forward, sdpa_attention_forward))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        attention_forward(module, q, q, q, None, softcap=2.0)


# "sdpa" is refused as it is set; another name is taken unseen, and its calls would leave out the sinks.
def test_models_that_cannot_run_on_sdpa_cannot_on_ours():
    config = hf.GptOssConfig(**TEXT, num_key_value_heads=2, head_dim=32, num_local_experts=2)
    model = hf.GptOssForCausalLM(config).eval()
    with pytest.raises(ValueError, match="does not support an attention implementation through"):
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation("fastvit")
    with pytest.raises(ValueError, match="GptOssAttention computes more than attention: as with 'sdpa'"):
        model(WORDS)
