"""What accelerate is told: which ops, what may be folded; and the ways to it but for the call."""

import pytest
import timm
import torch
from accelerated import close, fallbacks, images, pair, run

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


@pytest.mark.parametrize(("mode", "keeps"), [("train", False), ("inference", True)])
def test_only_inference_keeps_copies_and_folds_layer_scale(mode, keeps):
    model, fast = pair(mode=mode)
    derived.refresh()
    with fastvit.use_backend("cpp"):
        out, _ = run(fast, X)
    # As they were before they were packed: by oneDNN, or in panels.
    kept = [copy.value[0] for copy in derived.everything()]
    kept = [w.to_dense() if w.is_mkldnn else w for w in kept]
    kept = [w.transpose(1, 2).flatten(0, 1) if w.ndim == 3 else w for w in kept]
    weight, scale = fast.blocks[0].mlp.fc2.weight, fast.blocks[0].ls2.gamma
    assert bool(kept) == keeps
    assert keeps == any(w.shape == weight.shape and torch.equal(w, weight * scale[:, None]) for w in kept)
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
