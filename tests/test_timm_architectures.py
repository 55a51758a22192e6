"""fastvit.VisionTransformer, given what timm's registry gives its own class, is timm's architecture."""

import pytest
import timm
import torch
from timm_twins import constructor_arguments, plain_architectures, twins

import fastvit

# Beyond the variants (tests/test_variants.py), an architecture for each thing that timm's plain class can
# be asked for. Left out: sizes that differ from one of these, or from a variant, in width and depth only.
ARCHITECTURES = {
    "aimv2_large_patch14_224": "RMSNorm, SwiGLU with its own gate, no biases, a norm in the patch embedding",
    "aimv2_large_patch14_336": "the same at N = 576",
    "beit3_base_patch16_224": "norms before the projection and before fc2",
    "beit3_large_patch16_224": "the same, wider",
    "eva_large_patch14_196": "14x14 patches on 196 pixels",
    "eva_large_patch14_336": "N = 577",
    "flexivit_small": "no position for the class token, 240 pixels",
    "flexivit_base": "the same, wider",
    "test_vit": "dynamic image size",
    "test_vit2": "a register, no class token, LayerScale, dynamic size",
    "test_vit3": "attention pooling that sees the register",
    "test_vit4": "RMSNorm by name",
    "vit_base_patch14_reg1_tipsv2": "class token and register, LayerScale from 1",
    "vit_base_patch16_224_miil": "no QKV bias",
    "vit_base_patch16_gap_224": "mean pooling without a norm behind it, 48 channels a head",
    "vit_base_patch16_plus_240": "width 896",
    "vit_base_patch16_plus_clip_240": "width 896 with CLIP's norm before the blocks",
    "vit_base_patch16_radio_v3": "seven registers, no final norm",
    "vit_base_patch16_reg4_gap_256": "four registers, no class token, mean pooling",
    "vit_base_patch16_siglip_gap_224": "SigLIP without its pooling head",
    "vit_base_patch16_siglip_gap_512": "the same at N = 1024",
    "vit_betwixt_patch16_reg1_gap_256": "width 640",
    "vit_betwixt_patch16_reg4_gap_256": "width 640, four registers",
    "vit_betwixt_patch16_reg4_gap_384": "the same at N = 580",
    "vit_betwixt_patch32_clip_224": "CLIP at width 640",
    "vit_intern300m_patch14_448": "no final norm, dynamic size, N = 1025",
    "vit_large_patch14_clip_quickgelu_224": "QuickGELU",
    "vit_little_patch16_reg1_gap_256": "width 320",
    "vit_little_patch16_reg4_gap_256": "width 320, four registers",
    "vit_medium_patch16_clip_224": "CLIP at width 512",
    "vit_medium_patch16_gap_240": "no QKV bias with LayerScale",
    "vit_medium_patch16_gap_384": "the same at N = 576",
    "vit_medium_patch16_reg1_gap_256": "width 512, a register",
    "vit_medium_patch16_reg4_gap_256": "width 512, four registers",
    "vit_medium_patch32_clip_224": "32x32 patches",
    "vit_mediumd_patch16_reg4_gap_256": "20 blocks",
    "vit_small_patch16_36x1_224": "36 blocks, LayerScale",
    "vit_so150m2_patch16_reg1_gap_256": "width 832, hidden width not a multiple of the width",
    "vit_so150m_patch16_reg4_gap_256": "width 896, no norm behind the pooling",
    "vit_so150m_patch16_reg4_map_256": "attention pooling behind registers",
    "vit_so400m_patch14_reg1_tipsv2": "72 channels a head",
    "vit_so400m_patch14_siglip_gap_384": "384 pixels are not a multiple of 14",
    "vit_wee_patch16_reg1_gap_256": "width 256",
    "vit_xsmall_patch16_clip_224": "CLIP at width 256",
    "vit_giant_patch16_gap_224": "88 channels a head",
    "vit_huge_patch14_gap_224": "80 channels a head",
}


def _depth(name: str) -> int:
    return 1 if constructor_arguments(name)["embed_dim"] > 768 else 2


def test_at_least_forty():
    assert len(ARCHITECTURES) >= 40


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_hold_the_contract_against_timm(name):
    ours, theirs = twins(name, depth=_depth(name), weight_init="skip")
    report = fastvit.verify(ours, torch.randn(1, 3, *ours.patch_embed.img_size), oracle=theirs)
    report.raise_if_failed()


def test_every_plain_architecture_has_timms_keys_and_shapes():
    names = plain_architectures()
    assert len(names) >= 165
    for name in names:
        with torch.device("meta"):
            ours = fastvit.VisionTransformer(**constructor_arguments(name) | {"depth": 1})
            theirs = timm.create_model(name, depth=1)
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1], name


# Each way to leave the tokens, on the architectures where it means something.
@pytest.mark.parametrize("pool", ["", "token", "avg", "avgmax", "max", "map", "prr"])
@pytest.mark.parametrize("name", ["test_vit2", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_every_pooling(name, pool):
    class_token = constructor_arguments(name).get("class_token", True)
    if pool == "token" and not class_token:
        with pytest.raises(ValueError, match="needs the class token"):
            fastvit.VisionTransformer(global_pool="token", class_token=False, depth=1)
        return
    ours, theirs = twins(name, depth=1, global_pool=pool, num_classes=5, img_size=112)
    fastvit.verify(ours, torch.randn(2, 3, 112, 112), oracle=theirs).raise_if_failed()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", ["test_vit2", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_dynamic_sizes(name, pad):
    ours, theirs = twins(name, depth=1, img_size=112, dynamic_img_size=True, dynamic_img_pad=pad)
    ph, pw = ours.patch_embed.patch_size
    for height, width in [(112, 112), (8 * ph, 5 * pw), (7 * ph - 3, 9 * pw - 1)]:
        x = torch.randn(1, 3, height, width)
        if pad or not (height % ph or width % pw):
            fastvit.verify(ours, x, oracle=theirs).raise_if_failed()
        else:
            with pytest.raises(ValueError, match="not a multiple of the patch"):
                ours(x)
