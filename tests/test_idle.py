"""Calls that no kernel serves: computed once, by the original forward, from the first of a kind on."""

import copy
import threading
from collections import Counter

import pytest
import timm
import torch
from accelerated import close, images, pair
from native_calls import needs_library
from timm.models import vitamin
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import asking, backends, measurements, ops
from fastvit.accelerate import idle

# What moves no number.
_FREE = ("empty", "view", "detach", "alias", "transpose", "expand", "select", "unbind", "permute", "split")
_FREE += ("slice", "squeeze", "promote_types", "is_mkldnn_bf16_supported")


class Computations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name != "t" and not any(free in name for free in _FREE):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def computations(model, x):
    with Computations() as counted:
        out = model(x)
    return out, counted.seen


MODELS = {
    "vit": pair,
    "vit, any size": lambda: pair(dynamic_img_size=True),
    "eva": lambda: pair("eva"),
}


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        *((kind, {"batch": 2}, {"batch": 3}) for kind in MODELS),
        ("vit, any size", {"size": 32}, {"size": 48}),
    ],
)
def test_calls_in_turn_are_computed_once_each(kind, first, second):
    model, fast = MODELS[kind]()
    for size in (first, second) * 3:
        out, seen = computations(fast, images(**size))
        expected, needed = computations(model, images(**size))
        assert torch.equal(out, expected)
        # A copy that joins weights is no part of the forward.
        assert {**seen, "cat": 0} == {**needed, "cat": 0}


BLOCKS = {
    "plain": {"init_values": 0.1},
    "gated": {"mlp_layer": vitamin.GeGluMlp},  # whose norms and activation run as modules
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_no_hook_fires_for_a_question(kind):
    model = timm.models.vision_transformer.Block(64, 2, drop_path=0.1, **BLOCKS[kind]).eval()
    for name in [name for name, module in model.named_modules() if name and "attn" not in name]:
        fired = {}
        for each in (model, fastvit.accelerate(copy.deepcopy(model))):
            calls = fired[each] = []
            hook = each.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
            with torch.no_grad():
                for batch in (1, 2, 1):
                    each(torch.randn(batch, 5, 64))
            hook.remove()
        original, fast = map(len, fired.values())
        assert fast == original, name


def test_nothing_is_drawn_for_a_question():
    block = timm.models.vision_transformer.Block(64, 2, drop_path=0.5).eval()
    block.drop_path1.train()
    fast, x = fastvit.accelerate(copy.deepcopy(block)), torch.randn(6, 5, 64)
    for seed in (0, 1):
        found = []
        for each in (block, fast):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append((each(x), torch.rand(3)))
        close(found[1][0], found[0][0])
        assert torch.equal(found[1][1], found[0][1])


@torch.no_grad()
def test_what_is_remembered_is_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(idle, "MOST", 4)
    _, fast = pair(dynamic_img_size=True)
    asked = []
    original = idle.would_serve
    monkeypatch.setattr(idle, "would_serve", lambda calls: asked.append(1) or original(calls))
    for batch in (1, 2, 3, 4, 5, 5, 4, 3, 2):
        fast(images(batch))
    assert len(asked) == 5 * 3  # the embedding's and two blocks'
    for module in (fast, *fast.blocks):
        assert [kind[0][0] for kind in module.__dict__[idle.ATTRIBUTE]] == [2, 3, 4, 5]
    fast(images(1))
    assert len(asked) == 6 * 3


@needs_library()
@torch.no_grad()
def test_a_kernel_that_serves_is_asked_for_once(monkeypatch):
    rows = backends.TABLE["layer_norm_mlp"]
    worth = tuple(row._replace(worth=lambda *args, **kwargs: None) for row in rows)
    monkeypatch.setitem(backends.TABLE, "layer_norm_mlp", worth)
    model, fast = pair()
    asked = []
    original = idle.would_serve
    monkeypatch.setattr(idle, "would_serve", lambda calls: asked.append(1) or original(calls))
    for batch in (1, 2, 1, 2):
        out, seen = computations(fast, images(batch))
        assert any(name.startswith("fastvit") for name in seen)
        close(out, model(images(batch)))
    assert len(asked) == 2 * 3


@torch.no_grad()
def test_tables_that_say_otherwise_are_asked_again():
    _, fast = pair()
    fast(images())
    (before,) = fast.blocks[0].__dict__[idle.ATTRIBUTE]
    measurements.clear()
    fast(images())
    (after,) = fast.blocks[0].__dict__[idle.ATTRIBUTE]  # what the old ones said is gone
    assert after != before


CALLS = {
    "layer_norm_linear": lambda x: ops.layer_norm_linear(x, None, None, torch.randn(96, 64)),
    "attention": lambda x: ops.attention(torch.cat([x, x, x], 2), 2),
    "linear_residual": lambda x: ops.linear_residual(x, torch.randn(64, 64), None, x),
    "layer_norm_mlp": lambda x: ops.layer_norm_mlp(
        x, None, None, torch.randn(96, 64), None, torch.randn(64, 96), None
    ),
    "patch_embed": lambda x: ops.patch_embed(
        x.view(2, 1, 8, 8 * x.shape[1]), torch.randn(9, 1, 8, 8), prefix=torch.zeros(1, 3, 9)
    ),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("autocast", [False, True])
def test_an_op_that_is_asked_answers_with_the_shape_and_dtype_of_its_result(op, autocast):
    x, answers = torch.randn(2, 5, 64), []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        expected = CALLS[op](x)
        assert not asking.would_serve(lambda: answers.append(CALLS[op](x)))
    assert (answers[0].shape, answers[0].dtype) == (expected.shape, expected.dtype)


def test_another_thread_computes_while_one_asks():
    x, found = torch.randn(2, 5, 64), []
    call = CALLS["layer_norm_mlp"]

    def other():
        thread = threading.Thread(target=lambda: found.append((asking.is_asking(), call(x).abs().max() > 0)))
        thread.start()
        thread.join()

    assert not asking.would_serve(other)
    assert found == [(False, True)]
    assert not asking.is_asking()
