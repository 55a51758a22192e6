"""Whole models in training: gradients, memory, mixed precision, checkpoints, stochastic depth."""

import copy
from functools import partial

import pytest
import timm
import torch
from accelerated import fallbacks, images, pair, run
from native_calls import needs_library
from torch.autograd.graph import saved_tensors_hooks

import fastvit
from fastvit import recording
from fastvit.verification import randomize

X = images(batch=6)
BACKENDS = ["reference", pytest.param("cpp", marks=needs_library())]
HALVES = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")


def halves(backend):
    return fastvit.use_backend(**dict.fromkeys(HALVES, backend))


def gradients(model, x=X, **autocast):
    model.zero_grad()
    if autocast:
        with torch.autocast("cpu", **autocast):
            loss = model(x).float().square().mean()
    else:
        loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alike(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = gradient.norm()
        assert (found[name] - gradient).norm() <= rtol * size + 1e-7, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {}),
        ("vit", {"qk_norm": True, "init_values": None, "mlp_layer": timm.layers.SwiGLU}),
        (
            "vit",
            {"scale_attn_norm": True, "scale_mlp_norm": True, "class_token": False, "global_pool": "avg"},
        ),
        ("eva", {}),
    ],
)
def test_the_contracts_gradient_rules_hold_for_the_whole_model(kind, options, backend):
    """A gradient of 64 numbers errs by chance, in one batch of images; by a fault it errs in both."""
    _, fast = pair(kind, **options)
    with halves(backend):
        reports = [fastvit.verify(fast, images(batch=16, seed=seed), backward=True) for seed in (0, 1)]
    first, second = ({row.name for row in report.rows if not row.ok} for report in reports)
    assert not first & second
    checked = [row.name.startswith("grad ") for row in reports[0].rows]
    assert sum(checked) == len(list(fast.parameters()))


def _saved_bytes(function, model, x):
    """Of every storage that is kept for backward and is no parameter, whole and once."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters)


@needs_library()
@pytest.mark.parametrize(("width", "heads"), [(64, 2), (192, 3)])
@pytest.mark.parametrize(("checkpoint", "factor", "statistics"), [(None, 20, 16), ("mlp", 12, 8)])
@pytest.mark.parametrize("own", [True, False], ids=["fastvit", "timm"])
def test_a_block_saves_no_more_than_it_must(width, heads, checkpoint, factor, statistics, own):
    make = fastvit.layers.Block if own else timm.models.vision_transformer.Block
    block = make(width, heads, qkv_bias=True).bfloat16()
    fastvit.accelerate(block, checkpoint=checkpoint)
    x = torch.randn(2, 50, width, dtype=torch.bfloat16, requires_grad=True)
    with fastvit.use_backend("cpp"):
        saved = _saved_bytes(block, block, x) / 100
    assert saved == factor * width + statistics + 4 * heads
    assert _saved_bytes(fastvit.restore(block), block, x) / 100 > 1.4 * saved or own


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_mlp_gives_the_same_gradients(backend):
    _, fast = pair(drop_path_rate=0.5)
    with halves(backend):
        torch.manual_seed(1)
        _, expected = gradients(fast.train())
        fastvit.accelerate(fast, checkpoint="mlp")
        torch.manual_seed(1)
        _, found = gradients(fast)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_an_unknown_checkpoint():
    with pytest.raises(ValueError, match="checkpoint is 'attention'; it must be 'mlp' or None"):
        fastvit.accelerate(pair()[0], checkpoint="attention")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_yields_torchs_own_dtypes(backend, dtype):
    model, fast = pair()
    seen = {}
    for name, each in (("model", model), ("fast", fast)):
        seen[name] = []
        for block in each.blocks:
            block.register_forward_hook(lambda _m, _a, out, name=name: seen[name].append(out.dtype))
    if dtype == torch.float16:
        backend = "reference"  # the C++ library has no float16
    with halves(backend):
        _, found = gradients(fast, dtype=dtype)
    _, expected = gradients(model, dtype=dtype)
    assert seen["fast"] == seen["model"]
    assert {g.dtype for g in found.values()} == {torch.float32}
    alike(found, expected, rtol=0.05)


def test_a_grad_scaler_finds_what_overflows_and_steps_else():
    model, fast = pair()
    losses = {}
    for name, each in (("model", model), ("fast", fast)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        losses[name] = []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = each(X).float().square().mean()
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[name].append((float(loss.detach()), scaler.get_scale()))
    assert [scale for _, scale in losses["fast"]] == [scale for _, scale in losses["model"]]
    for (found, _), (expected, _) in zip(losses["fast"], losses["model"], strict=True):
        assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient_and_the_rest_get_theirs(backend):
    model, fast = pair()
    for each in (model, fast):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(("blocks.1" in name and "bias" not in name) or name.startswith("head"))
    with halves(backend):
        _, found = gradients(fast)
    alike(found, gradients(model)[1])
    assert 0 < len(found) < len(list(model.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms_are_honoured(backend):
    _, fast = pair(drop_path_rate=0.3)
    torch.use_deterministic_algorithms(True)
    try:
        with halves(backend):
            runs = []
            for _ in range(3):
                torch.manual_seed(2)
                runs.append(gradients(fast.train())[1])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in runs[0].items())


def test_dropout_of_attention_weights_runs_the_reference_with_the_reason():
    _, fast = pair(attn_drop_rate=0.2)
    with recording.recording() as recorder:
        fast.train()(X)
    attention = [event for event in recorder.events if event.op == "attention"]
    assert {event.backend for event in attention} == {"reference"}
    assert not any(event.accelerated for event in attention)
    reasons = {row.reason for row in fastvit.explain(fast, arch="sm_90").rows if row.op == "attention"}
    assert reasons == {"triton: its kernels have no dropout of attention weights"}


# Of stochastic depth on a subset: a plain model of the same rule, sample by sample.
def _by_hand(model, x, chosen):
    tokens = model.patch_embed(x)
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
    for block in model.blocks:
        for norm, layer, scale, path in (
            (block.norm1, block.attn, block.ls1, block.drop_path1),
            (block.norm2, block.mlp, block.ls2, block.drop_path2),
        ):
            branch = scale(layer(norm(tokens)))
            if path.__class__ is not torch.nn.Identity:
                kept = next(chosen)
                factor = torch.zeros(len(x)).index_fill(0, kept, len(x) / len(kept))
                branch = branch * factor[:, None, None]
            tokens = tokens + branch
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpoint", [None, "mlp"])
def test_stochastic_depth_on_a_subset(backend, checkpoint):
    model, fast = pair(drop_path_rate=0.5, init_values=0.1)
    fastvit.accelerate(fast, subset_drop_path=True, checkpoint=checkpoint)
    rows = []
    with halves(backend), recording.recording() as recorder:
        torch.manual_seed(3)
        fast.train()
        for block in fast.blocks:
            block.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[0]))
        loss, found = gradients(fast)
    assert not fallbacks(recorder.events)
    torch.manual_seed(3)
    # Block 0 drops nothing: its rate is 0. Half of six samples are kept in each half of block 1.
    chosen = iter([torch.randperm(6)[:3] for _ in range(2)])
    expected = _by_hand(model.eval(), X, chosen).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    alike(found, {n: p.grad for n, p in model.named_parameters()}, rtol=1e-3)
    assert rows == [6, 6]
    out = run(fast.eval(), X)[0]
    assert torch.equal(out, run(fastvit.accelerate(fast), X)[0])  # nothing of it in evaluation


def test_a_subset_with_masks_of_each_sample():
    model, fast = pair(drop_path_rate=0.5)
    fastvit.accelerate(fast, subset_drop_path=True)
    masks = (torch.rand(6, 1, 17, 17) > 0.3) | torch.eye(17, dtype=torch.bool)
    torch.manual_seed(4)
    out = fast.train()(X, attn_mask=masks)
    torch.manual_seed(4)
    chosen = iter([torch.randperm(6)[:3] for _ in range(2)])
    masked = copy.deepcopy(model).eval()
    for block in masked.blocks:
        block.attn.forward = partial(block.attn.forward, attn_mask=masks)
    torch.testing.assert_close(out, _by_hand(masked, X, chosen), rtol=1e-4, atol=1e-5)


def test_own_models_train_with_the_same_settings():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
    own = randomize(fastvit.VisionTransformer(**options, drop_path_rate=0.5)).train()
    fastvit.accelerate(own, subset_drop_path=True, checkpoint="mlp")
    torch.manual_seed(5)
    loss, found = gradients(own)
    assert torch.isfinite(loss)
    assert all(g.abs().max() > 0 for g in found.values())
