"""What a block computes with is decided before anything runs: whatever sits inside, it is as in the original.

Hooks fire as often as the original's from the first call on, and a fallback is a row of `explain`.
"""

import copy

import pytest
import timm
import torch
from accelerated import SMALL, close, fallbacks, images, pair, run
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp
from torch import nn

import fastvit
from fastvit.layers import AttentionPoolLatent
from fastvit.verification import randomize

X = images()
# timm's blocks whose attention has norms of q and k, and one behind the heads.
NORMED = {
    "vit": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    "eva": ("eva02_tiny_patch14_224", {"qk_norm": True, "scale_attn_inner": True}),
    "dinov3": ("vit_small_patch16_dinov3", {"qk_norm": True, "scale_attn_inner": True}),
}
INSIDE = ("attn_drop", "q_norm", "k_norm", "norm")


@pytest.fixture(scope="module", params=NORMED)
def models(request):
    name, options = NORMED[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options)
    for block in model.blocks:  # not every model hands these on to its attention
        attn, width = block.attn, SMALL["embed_dim"]
        attn.q_norm, attn.k_norm = (nn.LayerNorm(attn.head_dim, eps=1e-6) for _ in "qk")
        attn.norm = nn.LayerNorm(width, eps=1e-6)
    return randomize(model).eval()


def both(model):
    model = copy.deepcopy(model)
    return model, fastvit.accelerate(copy.deepcopy(model))


def test_norms_inside_are_served(models):
    model, fast = both(models)
    out, events = run(fast, X)
    close(out, run(model, X)[0])
    assert not fallbacks(events)
    assert fastvit.explain(fast, arch="sm_90").coverage.blocks == 1.0


@pytest.mark.parametrize("part", INSIDE)
def test_a_hook_inside_fires_as_in_the_original(models, part):
    calls = []
    for model in both(models):
        fired = []
        inside = getattr(model.blocks[0].attn, part)
        hook = inside.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        outputs = [run(model, X) for _ in range(2)]
        calls.append((len(fired), outputs))
    (theirs, expected), (ours, found) = calls
    assert ours == theirs == (0 if part == "attn_drop" else 2)
    for (out, _), (again, events) in zip(expected, found, strict=True):
        close(again, out)
        assert fallbacks(events) == [f"{part} carries a hook"]
    hook.remove()
    assert not fallbacks(run(model, X)[1])


def test_what_ran_unfused_is_a_row_and_not_covered(models):
    _, fast = both(models)
    fast.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    explanation = fastvit.explain(fast, arch="sm_90")
    rows = [(row.module, row.reason) for row in explanation.rows if row.op == "forward"]
    assert rows == [("blocks.0", "attn_drop carries a hook")]
    assert explanation.coverage.blocks == 0.5


def test_weights_shown_on_demand(models):
    model, fast = both(models)
    shown = []
    for each in (model, fast):
        each.blocks[1].attn.fused_attn = False
        each.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: shown.append(_[2]))
    out, events = run(fast, X)
    assert torch.equal(out, run(fast, X)[0])
    close(out, run(model, X)[0])
    assert len(shown) == 3
    close(shown[0], shown[2])
    assert fallbacks(events) == ["attn is set to show its attention weights"]


@pytest.mark.parametrize("kind", ["vit", "eva"])
def test_a_scale_changed_by_hand_is_what_the_original_makes_of_it(kind):
    for fused in (True, False):
        model, fast = pair(kind)
        for each in (model, fast):
            for block in each.blocks:
                block.attn.scale *= 3
                block.attn.fused_attn = fused
        expected = run(model, X)[0]
        for backend in ("auto", "auto", "reference", "cpp"):
            with fastvit.use_backend(backend):
                close(run(fast, X)[0], expected)
        assert torch.equal(expected, run(pair(kind)[0], X)[0]) == fused


def test_fastvits_own_scale_too():
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    expected = run(model, X)[0]
    attn = model.blocks[0].attn
    attn.scale *= 3
    assert torch.equal(run(model, X)[0], expected)
    attn.q_norm.register_forward_hook(lambda *_: None)
    close(run(model, X)[0], expected)


# Draws are the original's, whichever forward runs.
@pytest.mark.parametrize("part", ["attn_drop", None])
def test_dropped_attention_is_the_originals(part):
    outputs = []
    for model in pair("eva", attn_drop_rate=0.3):
        if part:
            getattr(model.blocks[0].attn, part).register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        outputs.append(model.train()(X).detach())
    close(outputs[1], outputs[0])


@pytest.mark.parametrize("part", ["norm2", "mlp.act"])
def test_vitamin_calls_nothing_that_is_hooked(part):
    torch.manual_seed(0)
    block = randomize(Block(64, 2, mlp_layer=GeGluMlp)).eval()
    x = torch.randn(2, 5, 64)
    _, events = run(fastvit.accelerate(copy.deepcopy(block)), x)
    assert not fallbacks(events)
    for each in (block, fastvit.accelerate(copy.deepcopy(block))):
        fired = []
        each.get_submodule(part).register_forward_hook(lambda *_, fired=fired: fired.append(1))
        _, events = run(each, x)
        assert fired == [1]
    assert fallbacks(events) == [f"{part.split('.')[-1]} carries a hook"]


def test_a_pooling_head_says_why():
    pool = AttentionPoolLatent(64, num_heads=2).eval()
    tokens = torch.randn(2, 5, 64)
    expected, events = run(pool, tokens)
    assert [event.op for event in events] == ["layer_norm_mlp"]
    pool.norm.register_forward_hook(lambda *_: None)
    out, events = run(pool, tokens)
    close(out, expected)
    assert fallbacks(events) == ["norm carries a hook"]


def test_a_backend_by_name_is_not_passed_by_in_silence(caplog):
    _, fast = pair()
    fast.blocks[0].attn.proj.register_forward_hook(lambda *_: None)
    with caplog.at_level("WARNING", "fastvit"):
        run(fast, X)
        with fastvit.use_backend("reference"):
            run(fast, X)
        assert not caplog.records
        for _ in range(2):
            with fastvit.use_backend("cpp"):
                run(fast, X)
    assert [record.getMessage() for record in caplog.records] == [
        "cpp asked for, and a module ran its original forward: proj carries a hook"
    ]
