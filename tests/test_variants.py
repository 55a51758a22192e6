"""Every variant in the table is timm's model of that name: keys, shapes, settings, numbers."""

import logging

import pytest
import safetensors.torch
import timm
import torch
from timm_twins import twins

import fastvit
from fastvit.layers.patch_embed import to_2tuple
from fastvit.layers.pos_embed import resize_pos_embed
from fastvit.variants import VARIANTS, get_variant
from fastvit.verification import randomize

DATA = ("input_size", "interpolation", "crop_pct", "num_classes", "first_conv", "classifier")


@pytest.mark.parametrize("name", VARIANTS)
def test_full_size_keys_shapes_and_settings_are_timms(name):
    with torch.device("meta"):
        ours, theirs = fastvit.create_model(name), timm.create_model(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    variant, config = get_variant(name), theirs.pretrained_cfg
    assert ours.patch_embed.img_size == config["input_size"][1:]
    if "laion" not in (config["tag"] or ""):  # those CLIP weights were fine-tuned with another mean
        assert (variant.family.mean, variant.family.std) == (config["mean"], config["std"])
    assert {key: ours.pretrained_cfg[key] for key in DATA} == {key: config[key] for key in DATA}


def _depth(arguments: dict) -> int:
    """All blocks of the small models; of the wide ones as few as show what runs in and between blocks."""
    if arguments["embed_dim"] <= 384 and arguments["img_size"] == 224:
        return arguments["depth"]
    return 2 if arguments["embed_dim"] <= 768 else 1


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_hold_the_contract_against_timm(name):
    arguments = get_variant(name).arguments
    small = {"depth": _depth(arguments), "weight_init": "skip"}
    ours = fastvit.VisionTransformer(**arguments | small).eval()
    theirs = timm.create_model(name, num_classes=ours.num_classes, **small).eval()
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    report = fastvit.verify(ours, torch.randn(1, 3, *to_2tuple(arguments["img_size"])), oracle=theirs)
    report.raise_if_failed()
    assert [row.name for row in report.rows][:2] == ["embed", "blocks.0"]


def test_unknown_variant_suggests_near_ones():
    with pytest.raises(
        ValueError, match="unknown variant 'vit_base_patch16_225'; did you mean vit_base_patch16_224"
    ):
        fastvit.create_model("vit_base_patch16_225")
    with pytest.raises(ValueError, match="list_models"):
        fastvit.create_model("zzz")


@pytest.fixture
def checkpoint(tmp_path):
    """vit_tiny at depth 1 with 7 classes and 14x14 positions, in a file."""
    _, model = twins("vit_tiny_patch16_224", depth=1, num_classes=7)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model


def test_checkpoint_brings_its_own_classes(checkpoint):
    path, model = checkpoint
    ours = fastvit.create_model("vit_tiny_patch16_224", path, depth=1).eval()
    x = torch.randn(2, 3, 224, 224)
    assert ours.num_classes == 7
    states = ours.state_dict(), model.state_dict()
    assert all(torch.equal(*(state[name] for state in states)) for name in states[1])
    # Not to the bit: how products add may depend on where in memory a weight lies.
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)


def test_checkpoint_then_new_classes_and_size(checkpoint, caplog):
    path, model = checkpoint
    with caplog.at_level(logging.INFO, logger="fastvit"):
        ours = fastvit.create_model("vit_tiny_patch16_224", path, depth=1, num_classes=3, img_size=(160, 96))
    assert ours(torch.randn(1, 3, 160, 96)).shape == (1, 3)
    resized = resize_pos_embed(model.pos_embed, (10, 6), (14, 14), 1, "timm")
    assert torch.equal(ours.pos_embed, resized)
    assert "7 classes give way to 3" in caplog.text
    assert "resized" in caplog.text


def test_checkpoint_already_at_the_size_asked_for(tmp_path):
    _, model = twins("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=96)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    ours = fastvit.create_model(
        "vit_tiny_patch16_224", tmp_path / "small.pth", depth=1, num_classes=0, img_size=96
    )
    assert torch.equal(ours.pos_embed, model.pos_embed)


def test_checkpoint_without_a_classifier_gets_a_new_one(tmp_path):
    _, model = twins("vit_small_patch14_dinov2", depth=1, img_size=98)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    arguments = {"depth": 1, "img_size": 98}
    ours = fastvit.create_model(
        "vit_small_patch14_dinov2", tmp_path / "dino.pth", num_classes=10, **arguments
    )
    assert ours.head.out_features == 10
    assert torch.equal(ours.norm.weight, model.norm.weight)


# 14x14 positions have as many rows as 7x28, and 24x24 of a model tuned at another size are no variant's.
@pytest.mark.parametrize(("file_size", "img_size"), [(224, (112, 448)), (384, 448), (384, 224)])
def test_checkpoint_brings_its_own_grid(tmp_path, file_size, img_size):
    _, model = twins("vit_tiny_patch16_224", depth=1, img_size=file_size)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    ours = fastvit.create_model("vit_tiny_patch16_224", tmp_path / "w.pth", depth=1, img_size=img_size)
    model.set_input_size(img_size)
    torch.testing.assert_close(ours.pos_embed, model.pos_embed)


def test_checkpoint_of_another_model_names_file_and_keys(checkpoint):
    path, _ = checkpoint
    with pytest.raises(
        fastvit.CheckpointError, match=r"weights\.safetensors \(\d+ bytes\)(.|\n)*blocks\.1\.norm1"
    ):
        fastvit.create_model("vit_tiny_patch16_224", path)
    with pytest.raises(fastvit.CheckpointError, match=r"cls_token"):
        fastvit.create_model("vit_small_patch16_224", path, depth=1)
