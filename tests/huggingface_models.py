"""transformers' vision models, small, and what each is called with."""

import torch
import transformers as hf
from library_parity import images
from torch import nn

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MLP = SMALL | {"intermediate_size": 96}
DINO = SMALL | {"mlp_ratio": 2, "layerscale_value": 0.5}
DINOV3 = MLP | {"layerscale_value": 0.5, "num_register_tokens": 3}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "eos_token_id": 49,
    "bos_token_id": 48,
}
WORDS = torch.tensor([[48, 5, 6, 7, 8, 9, 49, 1], [48, 3, 49, 1, 1, 1, 1, 1]] * 4)
PADDING = torch.tensor([[1] * 8, [1] * 3 + [0] * 5] * 4)
BOTH = {"input_ids": WORDS, "attention_mask": PADDING, "pixel_values": images()}
CUT = {
    "pixel_values": torch.randn(8, 12, 192, generator=torch.Generator().manual_seed(1)),
    "pixel_attention_mask": torch.tensor([[1] * 12, [1] * 6 + [0] * 6] * 4),
    "spatial_shapes": torch.tensor([[3, 4], [2, 3]] * 4),
}


def _clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=MLP, projection_dim=32))


def _siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT | {"projection_size": 64}, vision_config=MLP))


def _dinov3(**options) -> nn.Module:
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3, **options))


# How to build each, how to call it, and whether its embedding is fused.
MODELS = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP, num_labels=20)), images(), True),
    "vit eager": (
        lambda: hf.ViTModel(hf.ViTConfig(**MLP, qkv_bias=False, attn_implementation="eager")),
        images(),
        True,
    ),
    "deit": (lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP)), images(), True),
    "vit_mae": (
        lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**MLP)),
        {"pixel_values": images(), "noise": torch.rand(8, 16, generator=torch.Generator().manual_seed(2))},
        False,
    ),
    "vit_msn": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**MLP)), images(), True),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**MLP)), images(), True),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), images(), True),
    "dinov2 swiglu, another size": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True, hidden_act="silu")),
        images(size=(48, 40)),
        True,
    ),
    "dinov2 backbone": (
        lambda: hf.Dinov2Backbone(hf.Dinov2Config(**DINO, out_indices=[1, 2])),
        images(),
        True,
    ),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        images(size=48),
        True,
    ),
    "dinov3": (_dinov3, images(size=(40, 32)), True),
    "dinov3 gated": (lambda: _dinov3(use_gated_mlp=True, hidden_act="silu", key_bias=True), images(), True),
    "clip": (_clip, BOTH, True),
    "clip vision": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**MLP, projection_dim=32)),
        images(),
        True,
    ),
    "metaclip_2": (
        lambda: hf.MetaClip2VisionModel(hf.MetaClip2VisionConfig(**MLP, hidden_act="gelu")),
        images(),
        True,
    ),
    "siglip": (_siglip, BOTH, True),
    "siglip2": (
        lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**TEXT, num_patches=16, patch_size=8)),
        CUT,
        False,
    ),
    "aimv2": (lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**MLP)), images(), False),
}


def build(name: str) -> tuple[nn.Module, dict]:
    """The model, and the keyword arguments of its call."""
    make, call, _ = MODELS[name]
    torch.manual_seed(0)
    return make(), call if isinstance(call, dict) else {"pixel_values": call}
