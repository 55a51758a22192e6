"""What transformers' Trainer and other callers hand down to every layer, and masks as "eager" adds them."""

import contextlib
import inspect
import sys

import pytest
import torch
import transformers as hf
from huggingface_models import MLP, WORDS, build
from library_parity import BLOCK, events, images, named, pair, reasons, same
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastvit
from fastvit.accelerate.huggingface.layer import ATTENTIONS
from fastvit.accelerate.huggingface.sdpa import READ_BY_SDPA, read_by

KNOWN = hf.utils.generic.TransformersKwargs.__annotations__
ITEMS = {"num_items_in_batch": torch.tensor(8)}  # Trainer's, for the loss


class Untouched:
    """Fails whatever is done with it."""

    def __getattribute__(self, name):
        raise AssertionError(f"{name} was asked of a keyword that is not read")

    __bool__ = __len__ = __iter__ = __eq__ = __hash__ = __getattribute__


UNREAD = {name: Untouched() for name in (*KNOWN, "use_cache", "anything") if name not in READ_BY_SDPA}


def attention_classes():
    load = [build(name)[0] for name in ("vit", "dinov2", "dinov3", "clip", "siglip", "aimv2")]
    fastvit.accelerate(torch.nn.ModuleList(load))
    return [layer for layer in ATTENTIONS if layer.__module__.startswith("transformers.")]


def test_what_is_said_to_be_unread_is_untouched_by_every_attention_function():
    assert {"num_items_in_batch", "anything"} <= UNREAD.keys()
    assert {"softcap", "position_bias", "cache", "dropout", "is_causal"} <= READ_BY_SDPA
    q = torch.randn(1, 2, 5, 8)
    classes = attention_classes()
    eager = {sys.modules[layer.__module__].eager_attention_forward for layer in classes}
    assert len(eager) > 4
    module = torch.nn.Module()
    for function in (sdpa_attention_forward, *eager):
        assert read_by(function) <= READ_BY_SDPA
        given = {"attention_mask": None, "scaling": 0.3}
        out = function(module, q, q, q, **given)[0]
        assert torch.equal(function(module, q, q, q, **given, **UNREAD)[0], out)
    for layer in classes:  # what the attention module itself reads, the layers' `gather` names
        assert set(inspect.signature(layer.forward).parameters) <= {
            *("self", "hidden_states", "attention_mask", "position_embeddings", "kwargs"),
            "output_attentions",
        }


@pytest.mark.parametrize(
    "name", ["vit", "deit", "dinov2", "dinov2 with registers", "dinov3", "ijepa", "vit_msn"]
)
def test_trainers_keyword_hinders_nothing(name):
    original, ours = pair(build(name)[0])
    x = images(1)
    assert events(ours, x, **ITEMS) == events(ours, x) == ["patch_embed", *BLOCK * 2]
    same(ours(x, **ITEMS), original(x, **ITEMS))


def test_trainers_keyword_in_both_towers():
    model, call = build("clip")
    original, ours = pair(model)
    call = {name: value[:2] for name, value in call.items()}
    assert events(ours, **call, **ITEMS) == ["patch_embed", *BLOCK * 4]
    same(ours(**call, **ITEMS), original(**call, **ITEMS))


def test_trainers_keyword_with_fastvits_attention():
    fastvit.register_hf()
    model = hf.ViTModel(hf.ViTConfig(**MLP, attn_implementation="fastvit")).eval()
    assert events(model, images(1), **ITEMS) == ["attention"] * 2


def test_what_attention_reads_runs_the_original():
    original, ours = pair(build("vit")[0])
    layers = [model.vit.layers[0] for model in (original, ours)]
    x = torch.randn(1, 17, 64)
    for keywords in ({"position_bias": torch.ones(1, 1, 17, 17)}, {"is_causal": False, "cache": None}):
        assert reasons(layers[1], x, **keywords)
        same(layers[1](x, **keywords), layers[0](x, **keywords))
    for model in layers:
        with pytest.raises(ValueError, match="does not support `softcap`"):
            model(x, softcap=2.0)


# Left padding: the first rows of the second text see no key, and "eager" gives them the mean of all values.
@pytest.mark.parametrize("context", ["float32", "float16", "bfloat16", "autocast"])
def test_rows_that_see_no_key_are_as_in_eager_attention(context):
    model = build("clip")[0].text_model
    model.set_attn_implementation("eager")
    dtype = torch.float32 if context == "autocast" else getattr(torch, context)
    words = {"input_ids": WORDS[:2], "attention_mask": torch.tensor([[1] * 8, [0] * 5 + [1] * 3])}
    grads, outputs = [], []
    for each in pair(model):
        each.to(dtype)
        with torch.autocast("cpu", torch.bfloat16) if context == "autocast" else contextlib.nullcontext():
            out = each(**words)
        loss = sum(value.float().square().sum() for _, value in named(out))
        grads.append(torch.autograd.grad(loss, list(each.parameters())))
        outputs.append(out)
    same(outputs[1], outputs[0])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs)
