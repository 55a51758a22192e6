"""What transformers' models are called with is honoured after `accelerate`, or the original answers."""

import copy

import pytest
import torch
import transformers as hf
from huggingface_models import BOTH, DINO, DINOV3, MLP, WORDS, build
from library_parity import BLOCK, assert_parity, events, images, pair, reasons, same

import fastvit

X = images(batch=2)
# The last three patches take no part in the second image.
MASK = torch.ones(2, 17, dtype=torch.long).index_fill(1, torch.arange(14, 17), 0)
MASK[0] = 1
FUSED = ["patch_embed", *BLOCK * 2]


def vit(implementation="sdpa", **options):
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**MLP, **options), use_mask_token=True)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def vits(request):
    return pair(vit(request.param))


@pytest.fixture(scope="module")
def clip():
    return pair(build("clip")[0])


def masked(model):
    """What runs where there is a mask: "eager" adds it in a way of its own."""
    eager = model.config._attn_implementation == "eager"
    return ["patch_embed", *["eager attention adds a mask, in a way of its own"] * 2] if eager else FUSED


def test_masks_are_honoured(vits):
    original, ours = vits
    assert events(ours, X, attention_mask=MASK) == masked(ours)
    assert not torch.equal(ours(X, attention_mask=MASK)[0][1], ours(X)[0][1])
    assert_parity(original, ours, pixel_values=X, attention_mask=MASK)


# [B, H, N, N] as some pass it: of booleans, and of numbers.
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_head(vits, kind):
    original, ours = vits
    mask = torch.rand(2, 2, 17, 17, generator=torch.Generator().manual_seed(3)) > 0.3
    mask = mask if kind == "bool" else torch.where(mask, 0.5, -3.0)
    assert events(ours, X, attention_mask=mask) == masked(ours)
    same(ours(X, attention_mask=mask), original(X, attention_mask=mask))


def test_attention_weights_come_from_the_original():
    original, ours = pair(vit("eager"))
    theirs = original(X, output_attentions=True, output_hidden_states=True)
    assert len(theirs.attentions) == 2
    assert len(theirs.hidden_states) == 3
    assert reasons(ours, X, output_attentions=True) == {"its attention weights are asked for"}
    same(ours(X, output_attentions=True, output_hidden_states=True), theirs)
    # The hooks that did it stay, and hinder nothing.
    assert ours.layers[0].attention._forward_hooks
    assert events(ours, X) == FUSED
    ours.config.output_attentions = original.config.output_attentions = True
    assert reasons(ours, X) == {"attention carries a hook"}
    same(ours(X), original(X))


def test_a_users_hook_beside_theirs_is_seen():
    _, ours = pair(vit())
    ours(X, output_hidden_states=True)
    ours.layers[1].attention.register_forward_hook(lambda *_: None)
    assert events(ours, X) == ["patch_embed", *BLOCK, "attention carries a hook"]


def test_hidden_states_come_from_the_ops(vits):
    original, ours = vits
    assert events(ours, X, output_hidden_states=True) == FUSED
    theirs = original(X, output_hidden_states=True)
    assert len(theirs.hidden_states) == 3
    same(ours(X, output_hidden_states=True), theirs)
    same(ours(X, output_hidden_states=True, return_dict=False), theirs.to_tuple())
    same(ours(X, output_hidden_states=[1]), original(X, output_hidden_states=[1]))


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_positions_are_resized_as_the_model_does(vits, size):
    original, ours = vits
    call = {"pixel_values": images(2, size), "interpolate_pos_encoding": True}
    assert events(ours, **call) == FUSED
    same(ours(**call), original(**call))


@pytest.mark.parametrize("name", ["deit", "clip vision", "siglip", "ijepa", "vit_msn"])
def test_other_models_positions_too(name):
    model, call = build(name)
    original, ours = pair(model)
    call = {**call, "pixel_values": images(8, (40, 48)), "interpolate_pos_encoding": True}
    assert "patch_embed" in events(ours, **call)
    same(ours(**call), original(**call))


@pytest.mark.parametrize(
    "make",
    [
        vit,
        lambda: hf.DeiTModel(hf.DeiTConfig(**MLP), use_mask_token=True),
        lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)),
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)),
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)),
    ],
)
def test_masked_patches_are_embedded_by_the_original(make):
    original, ours = pair(make())
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 3:7] = True
    call = {"pixel_values": X, "bool_masked_pos": masked}
    assert events(ours, **call) == ["patches are masked", *BLOCK * 2]
    same(ours(**call), original(**call))


def test_images_that_do_not_fit_fail_as_before(vits):
    original, ours = vits
    for wrong in (images(2, 48), images(2, channels=4), X[0], X.to(torch.uint8)[:, :, :-1]):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            original(wrong)
        with pytest.raises(type(theirs.value)) as found:
            ours(wrong)
        assert str(found.value) == str(theirs.value)


# As many patches as the model has, and yet not its images.
def test_images_of_another_shape_fail_as_before():
    original, ours = pair(build("clip vision")[0])
    for model in (original, ours):
        with pytest.raises(ValueError, match="doesn't match model"):
            model(images(2, (16, 64)))


def test_images_that_no_whole_patch_covers(vits):
    original, ours = vits
    call = {"pixel_values": images(2, (37, 44)), "interpolate_pos_encoding": True}
    assert events(ours, **call)[0] == "the images are not whole patches"
    same(ours(**call), original(**call))


def test_images_in_another_dtype_are_cast_where_the_original_casts_them():
    original, ours = pair(hf.Dinov2Model(hf.Dinov2Config(**DINO)))
    for cast in (X.half(), (X * 40).to(torch.uint8)):
        assert events(ours, cast) == FUSED
        same(ours(cast), original(cast))


def test_texts_are_causal_and_padded(clip):
    original, ours = clip
    for call in ({"input_ids": WORDS}, {"input_ids": WORDS, "attention_mask": BOTH["attention_mask"]}):
        assert events(ours.text_model, **call) == [*BLOCK * 2]
        same(ours.text_model(**call), original.text_model(**call))
    changed = WORDS.clone()
    changed[:, 5:] = 30
    before = ours.text_model(WORDS).last_hidden_state
    assert torch.equal(ours.text_model(changed).last_hidden_state[:, :5], before[:, :5])


def test_another_attention_function_runs_itself():
    called = []

    def scaled_twice(module, query, key, value, attention_mask, **kwargs):
        called.append(module)
        return (query + key + value).transpose(1, 2), None

    hf.AttentionInterface.register("scaled_twice", scaled_twice)
    original, ours = pair(vit("scaled_twice"))
    same(ours(X), original(X))
    assert len(called) == 4
    assert reasons(ours, X) == {"attention is computed by scaled_twice"}
    sdpa = hf.AttentionInterface()["sdpa"]
    try:
        hf.AttentionInterface.register("sdpa", scaled_twice)
        _, ours = pair(vit("sdpa"))
        assert reasons(ours, X) == {"attention is computed by sdpa"}
    finally:
        hf.AttentionInterface.register("sdpa", sdpa)
    assert events(ours, X) == FUSED


def test_what_only_an_attention_function_understands_runs_the_original(vits):
    original, ours = vits
    call = {
        "hidden_states": torch.randn(2, 17, 64),
        "attention_mask": None,
        "position_bias": X.new_ones(1, 1, 17, 17),
    }
    assert reasons(ours.layers[0], **call) == {"it is called with position_bias"}
    same(ours.layers[0](**call), original.layers[0](**call))


def test_rotary_positions_are_no_option_of_dinov3():
    _, ours = pair(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)))
    with pytest.raises(TypeError, match="NoneType"):
        ours.model.layer[0](torch.randn(2, 20, 64))


# What is drawn in training is drawn in the same order, or by the original.
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: vit(attention_probs_dropout_prob=0.3), {*FUSED}),
        (
            lambda: vit("eager", attention_probs_dropout_prob=0.3),
            {"patch_embed", "eager attention drops weights, by draws of its own"},
        ),
        (
            lambda: vit(hidden_dropout_prob=0.3),
            {"dropout drops activations (p = 0.3, in training)"},
        ),
        (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, drop_path_rate=0.6)), {*FUSED}),
        (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3, drop_path_rate=0.6)), {*FUSED}),
        (
            lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**MLP, attention_dropout=0.3)),
            {*FUSED},
        ),
    ],
)
def test_training_draws_what_the_original_draws(make, expected):
    original, ours = (model.train() for model in pair(make()))
    call = {"pixel_values": images(8)}
    outputs = []
    for model in (original, ours, ours):
        torch.manual_seed(5 if len(outputs) < 2 else 6)
        outputs.append(model(**call)[0])
    same(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])
    assert {*events(ours, **call)} == expected


def test_gradient_checkpointing_recomputes_the_fused_layers():
    original, ours = (model.train() for model in pair(vit()))
    ours.gradient_checkpointing_enable()
    with fastvit.recording.recording() as recorder:
        loss = ours(X)[0].square().sum()
        before = len(recorder.events)
        loss.backward()
    assert len(recorder.events) - before == 2 * len(BLOCK)
    original(X)[0].square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), original.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_autocast_gives_the_same_dtypes():
    original, ours = pair(vit())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = ours(X), original(X)
    assert a[0].dtype == b[0].dtype
    torch.testing.assert_close(a[0], b[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_inference_mode_and_some_ops_only(name):
    model, call = build(name)
    original, ours = pair(model, mode="inference", ops=("attention", "patch_embed"))
    with fastvit.use_backend("cpp"), fastvit.recording.recording() as recorder, torch.no_grad():
        same(ours(**call), copy.deepcopy(original)(**call))
    assert {event.backend for event in recorder.events if event.op == "layer_norm_mlp"} == {"reference"}
