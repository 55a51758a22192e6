"""The cases that timm's own tests hold every model to, over accelerated models as over the originals.

Named after those of timm's tests/test_models.py. Left out: what needs pretrained weights, and torch.jit.
"""

import copy

import pytest
import timm
import torch
from accelerated import close, fallbacks, run
from timm.models._features import FeatureGetterNet
from torch import nn

import fastvit
from fastvit.verification import randomize

# Class token; dynamic size; attention pooling behind a register; registers and SwiGLU; CLIP's; rotary
# positions of both layouts, with learned tables, and with projections apart.
MODELS = {
    "vit_tiny_patch16_224": {},
    "test_vit": {},
    "test_vit3": {},
    "vit_giant_patch14_reg4_dinov2": {"embed_dim": 96, "num_heads": 3, "img_size": 56},
    "vit_base_patch16_clip_quickgelu_224": {"embed_dim": 96, "num_heads": 3, "img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {"img_size": 64},
    "vit_base_patch16_rope_mixed_224": {"embed_dim": 96, "num_heads": 3, "img_size": 64},
    "eva02_base_patch14_448": {"embed_dim": 96, "num_heads": 3, "img_size": 56},
}
DEPTH = 2


def build(name, **options):
    options = {"depth": DEPTH, "num_classes": 11} | MODELS[name] | options
    return randomize(timm.create_model(name, **options)).eval()


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    return request.param


@pytest.fixture
def both(name):
    model = build(name)
    return model, fastvit.accelerate(copy.deepcopy(model))


def sized(model, batch=1):
    size = model.patch_embed.img_size
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size)


def test_model_forward(both):
    model, fast = both
    x = sized(model, 2)
    out, events = run(fast, x)
    assert out.shape == (2, 11)
    assert not torch.isnan(out).any()
    close(out, run(model, x)[0])
    assert not fallbacks(events)


def test_model_backward(both):
    model, fast = both
    x = sized(model, 2)
    for each in both:
        each.train()
        torch.manual_seed(3)
        each(x).mean().backward()
    grads = {name: p.grad for name, p in fast.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [n for n, g in grads.items() if g is None]
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=2e-3, atol=1e-5 * largest, msg=name)


def test_model_default_cfgs_and_reset_classifier(both):
    model, fast = both
    x = sized(model)
    assert fast.default_cfg == model.default_cfg
    assert fast.num_features == model.num_features
    assert {n for n, _ in fast.named_parameters()} == {n for n, _ in model.named_parameters()}
    for each in both:
        assert each.forward_features(x).shape[-1] == each.num_features
        assert each.forward_head(each.forward_features(x), pre_logits=True).shape == (
            1,
            each.head_hidden_size,
        )
        each.reset_classifier(0)
        assert isinstance(each.get_classifier(), nn.Identity)
    close(run(fast, x)[0], run(model, x)[0])
    for each in both:
        torch.manual_seed(4)
        each.reset_classifier(5)
    close(run(fast, x)[0], run(model, x)[0])


def test_model_state_dict(both):
    model, fast = both
    other = build(next(n for n in MODELS), num_classes=3)
    fast.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fast.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        fast.load_state_dict(other.state_dict())


def test_model_forward_intermediates(both):
    model, _ = both
    x = sized(model, 2)
    for options in (
        {},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {
            "indices": 1,
            "return_prefix_tokens": model.num_prefix_tokens > 0,
            "norm": True,
            "output_fmt": "NLC",
        },
    ):
        with torch.no_grad():
            a, b = (each.forward_intermediates(x, **options) for each in both)
        flat = [torch.utils._pytree.tree_leaves(value) for value in (a, b)]
        assert len(flat[0]) == len(flat[1]) > 0
        for one, two in zip(*flat, strict=True):
            close(two, one)


def test_model_features(name):
    model = build(name)
    x = sized(model)
    theirs = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1))
    for ours in (
        fastvit.accelerate(FeatureGetterNet(model, out_indices=(0, 1))),
        FeatureGetterNet(fastvit.accelerate(copy.deepcopy(model)), out_indices=(0, 1)),
    ):
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        with torch.no_grad():
            for a, b in zip(ours(x), theirs(x), strict=True):
                close(a, b)


def test_model_set_input_size(both):
    model, fast = both
    patch = model.patch_embed.patch_size[0]
    size = model.patch_embed.img_size[0] + 2 * patch
    for each in both:
        each.set_input_size(img_size=size)
    x = torch.randn(1, model.patch_embed.proj.in_channels, size, size)
    out, events = run(fast, x)
    close(out, run(model, x)[0])
    assert not fallbacks(events)


def test_model_grad_checkpointing(both):
    model, fast = both
    x = sized(model)
    for each in both:
        each.set_grad_checkpointing()
        each(x).square().sum().backward()
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=2e-3, atol=1e-3 * float(a.grad.abs().max() + 1e-3))


@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"])
def test_model_in_training_draws_as_the_original(rate):
    model = build("vit_tiny_patch16_224", img_size=64, **{rate: 0.4}).train()
    fast = fastvit.accelerate(copy.deepcopy(model))
    x = sized(model, 8)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    out, events = run(fast, x)
    close(out, expected.detach())
    assert bool(fallbacks(events)) == (rate == "proj_drop_rate")
    assert not torch.equal(run(fast, x)[0], out)


@pytest.mark.parametrize("masked", ["mask", "causal"])
def test_model_with_a_mask(masked):
    model = build("vit_tiny_patch16_224", img_size=64)
    fast = fastvit.accelerate(copy.deepcopy(model))
    x = sized(model, 2)
    tokens = model.forward_features(x).shape[1]
    mask = torch.rand(tokens, tokens) > 0.3
    options = {"is_causal": True} if masked == "causal" else {"attn_mask": mask.fill_diagonal_(True)}
    with torch.no_grad():
        close(fast(x, **options), model(x, **options))
        assert not torch.allclose(fast(x, **options), fast(x))


def test_model_with_registers_of_another_embedding():
    model = randomize(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=5)).eval()
    fast = fastvit.accelerate(copy.deepcopy(model))
    x = torch.randn(1, 3, 224, 224)
    close(run(fast, x)[0], run(model, x)[0])
    rows = [row for row in fastvit.explain(fast).rows if row.module == "patch_embed"]
    assert [row.backend for row in rows] == ["original"]
    assert "VisionTransformerDistilled makes its tokens in a way of its own" in rows[0].reason
