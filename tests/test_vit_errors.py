"""Bad input to VisionTransformer gets one clear line."""

import pytest
import torch

from fastvit import VisionTransformer

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide the width 24"),
        ({"global_pool": "mean"}, "global_pool is 'mean'; it must be one of"),
        ({"class_token": False}, "global_pool='token' needs the class token"),
        ({"pos_embed": "rope"}, "pos_embed is 'rope'"),
        ({"weight_init": "he"}, "weight_init is 'he'"),
        ({"pos_resize": "mine"}, "pos_resize is 'mine'"),
        ({"norm_layer": "batchnorm"}, "unknown norm_layer 'batchnorm'; it must be one of layernorm, rmsnorm"),
        ({"act_layer": "gleu"}, "unknown act_layer 'gleu'"),
        ({"attn_layer": "diff"}, "unknown attn_layer 'diff'"),
        ({"patch_drop_rate": 1.0}, "patch_drop_rate is 1.0"),
    ],
)
def test_constructor(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        VisionTransformer(**TINY | arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3, 32, 32), {}, r"images must be \[B, C, H, W\]; the shape is \[3, 32, 32\]"),
        ((1, 1, 32, 32), {}, "images have 1 channels; the model takes 3"),
        ((1, 3, 40, 32), {}, "images are 40x32; the model takes 32x32: resize them"),
        ((1, 3, 36, 32), {"dynamic_img_size": True}, "images are 36x32, not a multiple of the patch, 8x8"),
        ((1, 3, 0, 32), {"dynamic_img_size": True}, "images are 0x32: they hold no pixel"),
    ],
)
def test_images(shape, arguments, message):
    model = VisionTransformer(**TINY | arguments)
    with pytest.raises(ValueError, match=message) as raised:
        model(torch.zeros(shape))
    assert "\n" not in str(raised.value)


def test_dtype():
    with pytest.raises(TypeError, match="images is torch.float16, but weight is torch.float32"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 32, 32, dtype=torch.float16))
    with pytest.raises(TypeError, match="images .unless uint8. must be floating point; it is torch.int64"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


def test_device():
    with pytest.raises(ValueError, match="images is on meta, but weight is on cpu"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 32, 32, device="meta"))
