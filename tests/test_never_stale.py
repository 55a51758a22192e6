"""No copy of weights goes stale without a word: the next call computes with what was written, by whomever."""

import copy
from functools import cache

import pytest
import timm
import torch
import transformers
from native_calls import needs_library
from tiny_twins import BACKENDS, assert_close, assert_same_weights, images, moved, output, pair, served_by
from weight_writers import BROAD, NARROW, WRITERS
from writing import matrices

import fastvit
from fastvit.verification import randomize

X, MORE = images(), images(16)  # of so many rounding counts as the contract has it
MODES = ("train", "inference")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with served_by(request.param):
        yield request.param


def follows(ours, twin, writer, x=X):
    """After each write the model computes what its twin does, and something else than before."""
    with torch.no_grad():
        before = output(twin, x)
        for _ in range(2):
            assert_close(output(ours, x), before)
    most = 0.0
    for fast, plain in zip(WRITERS[writer](ours), WRITERS[writer](twin), strict=True):
        assert_same_weights(fast, plain)
        with torch.no_grad():
            found, expected = output(fast, x), output(plain, x)
        most = max(most, moved(before, expected))
        assert_close(found, expected)
    assert most > 0.01


def cases(families, broad, narrow):
    """In both modes what is written broadly, and where weights are not frozen the rest."""
    return [
        pytest.param(family, mode, writer, id=f"{family}-{mode}-{writer}")
        for family in families
        for mode in (("train",) if family == "own, told nothing" else MODES)
        for writer in (*broad, *(narrow if mode == "train" else ()))
    ]


# What torch is told of, what it is not, what replaces memory, what is of another kind.
SOME = (
    *("in place", "LoRA merged", "data of vectors alone", "data, other memory", "flat vector", "torch_ema"),
    *("another process", "broadcast", "load_state_dict, assigned", "fused AdamW", "half and back"),
    *("parametrized", "deepcopy", "swap_tensors"),
)
OTHERS = (
    *("timm, q and v biases", "timm, q, k, v apart", "timm, dinov3", "hf dinov2", "hf clip", "torchvision"),
    *("open_clip", "own", "own, told nothing"),
)


@needs_library()
@pytest.mark.parametrize(
    ("family", "mode", "writer"),
    cases(["timm", "hf vit"], BROAD, NARROW) + cases(OTHERS, SOME, ["one row", "the last element"]),
)
def test_the_next_call_computes_with_what_was_written(family, mode, writer, backend):
    follows(*pair(family, mode), writer)


@cache
def _base(family):
    if family == "timm":
        model = timm.create_model("vit_base_patch16_224", depth=1, init_values=0.1)
    else:
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1))
    return randomize(model).eval()


# Where `auto` has tables: a ViT-B's width, batch 8, 197 tokens.
@pytest.mark.parametrize("family", ["timm", "hf vit"])
@pytest.mark.parametrize(
    ("mode", "writer"),
    [("train", "data, multiplied"), ("train", "the last element"), ("inference", "data, multiplied")],
)
def test_so_it_does_by_auto_at_the_width_of_a_vit_b(family, mode, writer):
    twin = copy.deepcopy(_base(family))
    follows(fastvit.accelerate(copy.deepcopy(twin), mode), twin, writer, images(8, 224))


FROZEN = ("timm", "timm, q and v biases", "timm, q, k, v apart", "hf vit", "hf dinov2")


def same_bits(a, b):
    with torch.no_grad():
        return torch.equal(output(a, X), output(b, X))


def anew(model):
    return fastvit.accelerate(copy.deepcopy(model), "inference")


@needs_library()
@pytest.mark.parametrize("family", FROZEN)
def test_one_number_of_frozen_weights_is_seen_by_verify_and_mended_by_refresh(family, backend):
    ours, _ = pair(family, "inference")
    assert same_bits(ours, anew(ours))
    assert fastvit.verify(ours, MORE).ok
    for name, p in matrices(ours):
        p.data[0, 0] += p.detach().abs().mean()
        fresh = anew(ours)
        followed = same_bits(ours, fresh)
        assert followed or not fastvit.verify(ours, MORE).ok, name
        fastvit.refresh(ours)
        assert same_bits(ours, fresh), name


@needs_library()
def test_verify_looks_at_copies_and_not_at_outputs_alone(backend):
    """A number that has no part in any output now, and will have."""
    ours, _ = pair("timm", "inference")
    mlp = ours.blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight[:, 5] = 0
    assert same_bits(ours, anew(ours))
    assert fastvit.verify(ours, MORE).ok
    mlp.fc1.weight.data[5, 7] += 1
    report = fastvit.verify(ours, MORE)
    with torch.no_grad():
        mlp.fc2.weight[:, 5] = 1
    assert same_bits(ours, anew(ours)) or not report.ok
