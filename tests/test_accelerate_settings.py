"""What accelerate is told: which ops, what may be folded; and the ways to it but for the call."""

import pytest
import timm
import torch
from accelerated import SMALL, close, fallbacks, images, pair, run

import fastvit
from fastvit import derived

X = images()
BLOCK_OPS = {"layer_norm_linear", "attention", "linear_residual", "layer_norm_mlp"}


def test_some_ops_only():
    model, fast = pair()
    fastvit.accelerate(fast, ops=["layer_norm_mlp"])
    names = ("layer_norm_mlp", "linear_residual")
    with fastvit.use_backend(**dict.fromkeys(names, "cpp")):
        out, events = run(fast, X)
    close(out, run(model, X)[0])
    assert {(e.op, e.backend) for e in events if e.op in names} == {
        ("layer_norm_mlp", "cpp"),
        ("linear_residual", "reference"),
    }


@pytest.mark.parametrize(("mode", "folded"), [("train", False), ("inference", True)])
def test_only_inference_folds_layer_scale(mode, folded):
    model, fast = pair(mode=mode)
    derived.refresh()
    with fastvit.use_backend("cpp"):
        out, _ = run(fast, X)
    # As they were before they were packed: by oneDNN, or in panels.
    kept = [w.to_dense() if w.is_mkldnn else w for w, *_ in derived.everything()]
    kept = [w.transpose(1, 2).flatten(0, 1) if w.ndim == 3 else w for w in kept]
    weight, scale = fast.blocks[0].mlp.fc2.weight, fast.blocks[0].ls2.gamma
    plain = any(w.shape == weight.shape and torch.equal(w, weight) for w in kept)
    scaled = any(w.shape == weight.shape and torch.equal(w, weight * scale[:, None]) for w in kept)
    assert (plain, scaled) == (not folded, folded)
    close(out, run(model, X)[0])


def test_a_class_that_was_patched_before_is_left_alone(monkeypatch):
    from fastvit.layers import plain

    original = timm.layers.Mlp.forward
    monkeypatch.setattr(timm.layers.Mlp, "forward", lambda self, x: 2 * original(self, x))
    monkeypatch.setitem(plain._FORWARDS, timm.layers.Mlp, plain._FORWARDS.get(timm.layers.Mlp))
    plain.known(timm.layers.Mlp)
    model, fast = pair()
    out, events = run(fast, X)
    assert torch.equal(out, run(model, X)[0])
    assert len(fallbacks(events)) == 2


def test_own_models_are_told_too():
    own = fastvit.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2).eval()
    out = run(own, X)[0]
    fastvit.accelerate(own, ops=["attention"])
    with fastvit.use_backend(layer_norm_mlp="cpp"):
        again, events = run(own, X)
    assert {e.backend for e in events if e.op == "layer_norm_mlp"} == {"reference"}
    close(again, out)
    fastvit.restore(own)
    assert not any("_fastvit" in m.__dict__ for m in own.modules())


def test_timms_block_fn():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=fastvit.TimmBlock).eval()
    assert type(theirs.blocks[0]) is fastvit.TimmBlock
    out, events = run(theirs, torch.randn(1, 3, 224, 224))
    assert {e.op for e in events} == BLOCK_OPS
    assert torch.equal(out, out)
    assert type(fastvit.restore(theirs).blocks[0]) is timm.models.vision_transformer.Block


def test_a_block_that_no_kernel_serves_runs_its_original_forward_at_once(monkeypatch):
    from fastvit.accelerate.timm_vit import Block

    model, fast = pair()
    gathered = []
    original = Block.gather
    monkeypatch.setattr(Block, "gather", lambda self, *a, **k: gathered.append(1) or original(self, *a, **k))
    with torch.no_grad():
        first = fast(X)
        assert len(gathered) == 2
        assert torch.equal(fast(X), first)
        assert len(gathered) == 2
        fast(images(batch=5))  # another size, and back
        assert len(gathered) == 4
        with fastvit.use_backend(layer_norm_mlp="cpp"):  # by name, it is never left out
            close(fast(images(batch=5)), model(images(batch=5)))
        assert len(gathered) == 6
        fast(images(batch=5))  # what was seen of automatic calls stands
        assert len(gathered) == 6
        fastvit.accelerate(fast)  # told something new
        fast(images(batch=5))
        assert len(gathered) == 8
        run(fast, images(batch=5))  # somebody watches
        assert len(gathered) == 10
    fastvit.restore(fast)
    assert not any("_fastvit_idle" in module.__dict__ for module in fast.modules())


def test_the_first_call_and_the_next_give_the_same_bits():
    for kind in ("vit", "eva"):
        model, fast = pair(kind)
        with torch.no_grad():
            first = fast(X)
            assert torch.equal(fast(X), first)
            assert torch.equal(model(X), first)  # no kernel serves these sizes


def test_strict_leaves_what_was_told_before():
    _, fast = pair()
    fast.blocks[1] = timm.models.vision_transformer.ResPostBlock(64, num_heads=2, init_values=0.1).eval()
    kinds, told = [type(module) for module in fast.modules()], dict(fast.blocks[0].__dict__)
    with pytest.raises(ValueError, match="its norms come behind attention and MLP"):
        fastvit.accelerate(fast, mode="inference", strict=True)
    assert [type(module) for module in fast.modules()] == kinds
    assert fast.blocks[0].__dict__["_fastvit"] == told["_fastvit"]


@torch.no_grad()
def test_a_bias_that_is_zeros_is_joined_once():
    from fastvit.accelerate.joined import joined_projections

    layers = [torch.nn.Linear(4, 4, bias=bias) for bias in (True, False, True)]
    weight, bias = joined_projections(layers)
    assert torch.equal(weight, torch.cat([layer.weight for layer in layers]))
    assert torch.equal(bias, torch.cat([layers[0].bias, torch.zeros(4), layers[2].bias]))
    again = joined_projections(layers)
    assert again[0] is weight
    assert again[1] is bias
    layers[2].bias.add_(1)
    assert torch.equal(joined_projections(layers)[1][8:], layers[2].bias)


@pytest.mark.parametrize("own", [True, False], ids=["fastvit", "timm"])
def test_a_replica_that_normalises_has_no_parameters_to_ask(own):
    """nn.DataParallel's replicas keep tensors in the place of parameters; FSDP's are of another shape."""
    model, fast = pair()
    if own:
        fast = fastvit.VisionTransformer(**SMALL, init_values=0.1).eval()
        fast.load_state_dict(model.state_dict())
    fastvit.fold_normalize(fast, (0.5,) * 3, (0.5,) * 3)
    fast.patch_embed.proj.register_forward_hook(lambda *_: None)  # so that the op does not serve
    for module in fast.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.__dict__[name] = None if parameter is None else parameter.detach()
    raw = (X * 50 + 128).clamp(0, 255).to(torch.uint8)
    close(fast(raw), model((raw / 255 - 0.5) / 0.5))
