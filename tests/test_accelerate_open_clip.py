"""open_clip's transformers after `accelerate`: towers of images and texts, masks, and what is left alone."""

import copy

import open_clip
import pytest
import torch
from library_models import open_clip_model
from library_parity import BLOCK, assert_parity, events, images, pair, reasons, same
from open_clip.transformer import LayerNormFp32, QuickGELU, ResidualAttentionBlock, VisionTransformer

import fastvit
from fastvit.accelerate.candidates import why_left_alone
from fastvit.verification import randomize

FUSED = ["patch_embed", *BLOCK * 2]
X = images(batch=2)


@pytest.fixture(scope="module")
def models():
    return pair(open_clip_model()[0])


def vision(**options):
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "mlp_ratio": 1.5}
    torch.manual_seed(0)
    return VisionTransformer(**sizes | {"output_dim": 32} | options)


# The whole of CLIP; then a vision tower with each option that the ops or the embedding mind.
MODELS = {
    "clip": lambda: open_clip_model(),
    "quick gelu": lambda: open_clip_model(quick_gelu=True),
    "pooled tokens": lambda: (
        vision(output_tokens=True, pool_type="avg", act_layer=QuickGELU),
        {"x": images()},
    ),
    "no norm before": lambda: (vision(no_ln_pre=True, final_ln_after_pool=True), {"x": images()}),
    "fixed positions": lambda: (vision(pos_embed_type="sin_cos_2d"), {"x": images()}),
}


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in MODELS), ("clip", "cpp"), ("quick gelu", "cpp")]
)
def test_outputs_and_gradients_are_within_the_contract(name, backend):
    model, call = MODELS[name]()
    original, ours = pair(model)
    assert events(ours, **call) == [*FUSED, *BLOCK * 2 * ("text" in call)]
    with fastvit.use_backend(backend):
        assert_parity(original, ours, **call)


# On few images, because they are interpreted where there is no GPU.
def test_those_of_the_kernels_are_too():
    original, ours = pair(vision(output_tokens=True))
    with fastvit.use_backend("triton"), fastvit.recording.recording() as recorder:
        assert_parity(original, ours, X)
    assert [event.backend for event in recorder.events].count("triton") == 3


def test_attention_pooling_stays_as_it_is():
    original, ours = pair(vision(attentional_pool=True, attn_pooler_heads=2))
    assert events(ours, X) == FUSED
    same(ours(X), original(X))


# Which computes in float32 whatever comes, so that it is no oracle in float64.
def test_norms_of_float32(models):
    original, ours = pair(vision(norm_layer=LayerNormFp32))
    assert events(ours, X) == FUSED
    same(ours(X), original(X))


def test_texts_stay_causal(models):
    _, ours = models
    text = torch.randint(1, 49, (2, 12))
    changed = text.clone()
    changed[:, 6:] = 49
    block = ours.transformer.resblocks[0]
    tokens = [ours.token_embedding(t) for t in (text, changed)]
    with fastvit.recording.recording() as recorder:
        a, b = (block(t, attn_mask=ours.attn_mask) for t in tokens)
    assert {event.op for event in recorder.events} == {*BLOCK}
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


# [N, N] and [B * H, N, N], added to the logits; booleans are turned to numbers, and added too.
@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("shape", [(12, 12), (6, 12, 12)])
def test_masks(models, shape, kind):
    original, ours = (model.transformer.resblocks[0] for model in models)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    mask = mask > 0.3 if kind == "bool" else mask
    call = {"q_x": torch.randn(3, 12, 64), "attn_mask": mask}
    assert not reasons(ours, **call)
    same(ours(**call), original(**call))
    assert not torch.allclose(ours(**call), ours(call["q_x"]))


def test_other_keys_and_values_are_attended_by_the_original(models):
    original, ours = (model.transformer.resblocks[0] for model in models)
    q_x, other = torch.randn(2, 2, 12, 64).unbind()
    assert reasons(ours, q_x, k_x=other, v_x=other) == {"its keys and values are of other tokens"}
    same(ours(q_x, k_x=other, v_x=other), original(q_x, k_x=other, v_x=other))


def test_tokens_without_a_batch_run_the_original(models):
    original, ours = (model.transformer.resblocks[0] for model in models)
    assert reasons(ours, torch.randn(12, 64)) == {"it is called with 2 dimensions, not [B, N, D]"}
    x = torch.randn(12, 64)
    same(ours(x), original(x))


def test_a_block_that_takes_tokens_first_runs_itself():
    torch.manual_seed(0)
    original = randomize(ResidualAttentionBlock(64, 2, batch_first=False)).eval()
    ours = fastvit.accelerate(copy.deepcopy(original))
    x = torch.randn(12, 2, 64)
    assert reasons(ours, x) == {"attn takes the tokens before the batch"}
    same(ours(x), original(x))


def test_intermediates_are_the_same(models):
    original, ours = models
    call = {"indices": 2, "normalize_intermediates": True, "output_extra_tokens": True}
    same(ours.visual.forward_intermediates(X, **call), original.visual.forward_intermediates(X, **call))


def test_dropped_patches_are_drawn_behind_the_op():
    original, ours = (model.train() for model in pair(vision(patch_dropout=0.5)))
    outputs = []
    for model, seed in ((original, 5), (ours, 5), (ours, 6)):
        torch.manual_seed(seed)
        outputs.append(model(X))
    same(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])
    assert events(ours, X) == FUSED


def test_gradient_checkpointing(models):
    _, ours = copy.deepcopy(models)
    ours.train().set_grad_checkpointing()
    with fastvit.recording.recording() as recorder:
        loss = ours.visual(X).square().sum()
        before = len(recorder.events)
        loss.backward()
    assert len(recorder.events) - before == 2 * len(BLOCK)


def test_wrong_images_fail_as_before(models):
    original, ours = models
    for wrong in (images(2, 48), images(2, channels=1), X.double()):
        with pytest.raises(RuntimeError) as theirs:
            original.visual(wrong)
        with pytest.raises(RuntimeError) as found:
            ours.visual(wrong)
        assert str(found.value) == str(theirs.value)


def test_autocast_gives_the_same_dtypes(models):
    original, ours = models
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = ours.visual(X), original.visual(X)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# In pure half precision open_clip keeps its norms in float32, which the ops do not take beside half weights.
def test_in_half_precision_norms_stay_in_float32():
    model, _ = open_clip_model({"ls_init_value": None}, cast_dtype=torch.bfloat16)
    original, ours = pair(model)
    for converted in (original, ours):
        open_clip.model.convert_weights_to_lp(converted, torch.bfloat16)
    half = X.bfloat16()
    assert reasons(ours.visual, half) == {"a norm is in torch.float32 beside a weight in torch.bfloat16"}
    assert torch.equal(ours.visual(half), original.visual(half))


def test_custom_blocks_are_left_alone_with_a_reason():
    model = vision(qk_norm=True)
    block = model.transformer.resblocks[0]
    assert type(block).__name__ == "CustomResidualAttentionBlock"
    assert "no op does" in why_left_alone(block)
    with pytest.raises(ValueError, match="by cosine"):
        fastvit.accelerate(model, strict=True)
    original = copy.deepcopy(model).eval()
    ours = fastvit.accelerate(model).eval()
    assert events(ours, X) == ["patch_embed"]
    same(ours(X), original(X))


def test_coca_reads_images_and_writes_texts():
    torch.manual_seed(0)
    tower = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    tower |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    words = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
    text = words | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 12, "width": 64, "heads": 2, "layers": 1, "mlp_ratio": 2}
    model = open_clip.CoCa(64, decoder | {"vocab_size": 50}, text, tower)
    original, ours = pair(model)
    tokens = torch.randint(1, 49, (2, 12), generator=torch.Generator().manual_seed(2))
    assert events(ours, X, tokens).count("attention") == 5
    assert reasons(ours, X, tokens) == {"its keys and values are of other tokens"}
    same(ours(X, tokens), original(X, tokens))
