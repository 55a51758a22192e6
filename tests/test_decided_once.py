"""What a block computes with is decided before anything runs: whatever sits inside, it is as in the original.

Hooks fire as often as the original's from the first call on, and a fallback is a row of `explain`.
"""

import copy

import pytest
import timm
import torch
from accelerated import SMALL, close, fallbacks, images, run
from torch import nn

import fastvit
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
        hook = getattr(model.blocks[0].attn, part).register_forward_hook(
            lambda *_, fired=fired: fired.append(1)
        )
        outputs = [run(model, X) for _ in range(2)]
        calls.append((len(fired), outputs))
    (theirs, expected), (ours, found) = calls
    assert ours == theirs == (0 if part == "attn_drop" else 2)
    for (out, _), (again, events) in zip(expected, found, strict=True):
        assert torch.equal(again, out) or close(again, out) is None
        assert fallbacks(events) == [f"{part} carries a hook"]
    rows = [row for row in fastvit.explain(model).rows if row.op == "forward"]
    assert [(row.module, row.reason) for row in rows] == [("blocks.0", f"{part} carries a hook")]
    assert fastvit.explain(model, arch="sm_90").coverage.blocks == 0.5
    hook.remove()
    assert not fallbacks(run(model, X)[1])
