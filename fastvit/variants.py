"""The one table of variants, by timm's names, and ``create_model``."""

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .checkpoint import load_state, read_state_dict
from .layers.mlp import SwiGLUPacked
from .layers.norm import LayerNorm
from .layers.patch_embed import to_2tuple
from .vit import VisionTransformer

logger = logging.getLogger("fastvit")


@dataclass(frozen=True)
class Family:
    """What models trained in the same way share."""

    source: str
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    num_classes: int = 1000
    pos_resize: str = "timm"
    crop_pct: float | None = None  # None: 0.9 at 224 pixels, all of the image above
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One row: the constructor's arguments, and how images are normalised for it."""

    family: Family
    arguments: dict[str, Any]
    crop_pct: float


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

VIT = Family("arXiv 2010.11929, 2106.10270")
DINO = Family("arXiv 2104.14294", **IMAGENET, num_classes=0)
DINOV2 = Family("arXiv 2304.07193", crop_pct=1.0, **IMAGENET, num_classes=0, arguments={"init_values": 1e-5})
DINOV2_REG = Family(
    "arXiv 2309.16588",
    crop_pct=1.0,
    **IMAGENET,
    num_classes=0,
    arguments={"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
)
DEIT = Family("arXiv 2012.12877", **IMAGENET)
DEIT3 = Family("arXiv 2204.07118", **IMAGENET, arguments={"no_embed_class": True, "init_values": 1e-6})
CLIP = Family(
    "arXiv 2103.00020, 2212.07143",
    crop_pct=1.0,
    **OPENAI,
    arguments={"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)},
)
CLIP_QUICK = Family(
    "arXiv 2103.00020, 2309.16671",
    crop_pct=1.0,
    **OPENAI,
    arguments={"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5), "act_layer": "quick_gelu"},
)
SIGLIP = Family(
    "arXiv 2303.15343", crop_pct=0.9, num_classes=0, arguments={"class_token": False, "global_pool": "map"}
)
SIGLIP2 = Family(
    "arXiv 2502.14786",
    crop_pct=0.9,
    num_classes=0,
    arguments={"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
)

# Names of the literature: tiny, small, medium, base, large, huge, giant, gigantic, shape-optimised.
Ti = {"embed_dim": 192, "depth": 12, "num_heads": 3}
S = {"embed_dim": 384, "depth": 12, "num_heads": 6}
M = {"embed_dim": 512, "depth": 12, "num_heads": 8}
B = {"embed_dim": 768, "depth": 12, "num_heads": 12}
L = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
H = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
g = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11}
G = {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13}
g_swiglu = {
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "mlp_ratio": 5.33334,
    "mlp_layer": SwiGLUPacked,
    "act_layer": nn.SiLU,
}
g_opt = {"embed_dim": 1536, "depth": 40, "num_heads": 16}
So400m = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}


def _row(
    shape: dict, patch_size: int, img_size: int, family: Family, *, crop_pct: float | None = None, **more
) -> Variant:
    sizes = {"img_size": img_size, "patch_size": patch_size}
    rest = {"num_classes": family.num_classes, "pos_resize": family.pos_resize}
    if crop_pct is None:
        crop_pct = family.crop_pct or (1.0 if img_size > 224 else 0.9)
    return Variant(family, sizes | shape | rest | family.arguments | more, crop_pct)


VARIANTS: dict[str, Variant] = {
    "vit_tiny_patch16_224": _row(Ti, 16, 224, VIT),
    "vit_tiny_patch16_384": _row(Ti, 16, 384, VIT),
    "vit_small_patch8_224": _row(S, 8, 224, DINO),
    "vit_small_patch16_224": _row(S, 16, 224, VIT),
    "vit_small_patch16_384": _row(S, 16, 384, VIT),
    "vit_small_patch32_224": _row(S, 32, 224, VIT),
    "vit_small_patch32_384": _row(S, 32, 384, VIT),
    "vit_base_patch8_224": _row(B, 8, 224, VIT),
    "vit_base_patch16_224": _row(B, 16, 224, VIT),
    "vit_base_patch16_384": _row(B, 16, 384, VIT),
    "vit_base_patch32_224": _row(B, 32, 224, VIT),
    "vit_base_patch32_384": _row(B, 32, 384, VIT),
    "vit_large_patch14_224": _row(L, 14, 224, VIT),
    "vit_large_patch16_224": _row(L, 16, 224, VIT),
    "vit_large_patch16_384": _row(L, 16, 384, VIT),
    "vit_large_patch32_224": _row(L, 32, 224, VIT, num_classes=0),
    "vit_large_patch32_384": _row(L, 32, 384, VIT),
    "vit_huge_patch14_224": _row(H, 14, 224, VIT, num_classes=0),
    "vit_giant_patch14_224": _row(g, 14, 224, VIT),
    "vit_gigantic_patch14_224": _row(G, 14, 224, VIT),
    "deit_tiny_patch16_224": _row(Ti, 16, 224, DEIT),
    "deit_small_patch16_224": _row(S, 16, 224, DEIT),
    "deit_base_patch16_224": _row(B, 16, 224, DEIT),
    "deit_base_patch16_384": _row(B, 16, 384, DEIT),
    "deit3_small_patch16_224": _row(S, 16, 224, DEIT3),
    "deit3_small_patch16_384": _row(S, 16, 384, DEIT3),
    "deit3_medium_patch16_224": _row(M, 16, 224, DEIT3),
    "deit3_base_patch16_224": _row(B, 16, 224, DEIT3),
    "deit3_base_patch16_384": _row(B, 16, 384, DEIT3),
    "deit3_large_patch16_224": _row(L, 16, 224, DEIT3),
    "deit3_large_patch16_384": _row(L, 16, 384, DEIT3),
    "deit3_huge_patch14_224": _row(H, 14, 224, DEIT3),
    "vit_small_patch14_dinov2": _row(S, 14, 518, DINOV2),
    "vit_base_patch14_dinov2": _row(B, 14, 518, DINOV2),
    "vit_large_patch14_dinov2": _row(L, 14, 518, DINOV2),
    "vit_giant_patch14_dinov2": _row(g_swiglu, 14, 518, DINOV2),
    "vit_small_patch14_reg4_dinov2": _row(S, 14, 518, DINOV2_REG),
    "vit_base_patch14_reg4_dinov2": _row(B, 14, 518, DINOV2_REG),
    "vit_large_patch14_reg4_dinov2": _row(L, 14, 518, DINOV2_REG),
    "vit_giant_patch14_reg4_dinov2": _row(g_swiglu, 14, 518, DINOV2_REG),
    "vit_base_patch16_clip_224": _row(B, 16, 224, CLIP, crop_pct=0.95),
    "vit_base_patch16_clip_384": _row(B, 16, 384, CLIP),
    "vit_base_patch16_clip_quickgelu_224": _row(B, 16, 224, CLIP_QUICK, num_classes=512),
    "vit_base_patch32_clip_224": _row(B, 32, 224, CLIP, crop_pct=0.9),
    "vit_base_patch32_clip_256": _row(B, 32, 256, CLIP, num_classes=512),
    "vit_base_patch32_clip_384": _row(B, 32, 384, CLIP),
    "vit_base_patch32_clip_448": _row(B, 32, 448, CLIP),
    "vit_base_patch32_clip_quickgelu_224": _row(B, 32, 224, CLIP_QUICK, crop_pct=0.9, num_classes=512),
    "vit_large_patch14_clip_224": _row(L, 14, 224, CLIP),
    "vit_large_patch14_clip_336": _row(L, 14, 336, CLIP),
    "vit_large_patch14_clip_quickgelu_224": _row(L, 14, 224, CLIP_QUICK, num_classes=768),
    "vit_large_patch14_clip_quickgelu_336": _row(L, 14, 336, CLIP_QUICK, num_classes=768),
    "vit_huge_patch14_clip_224": _row(H, 14, 224, CLIP),
    "vit_huge_patch14_clip_336": _row(H, 14, 336, CLIP),
    "vit_huge_patch14_clip_378": _row(H, 14, 378, CLIP, num_classes=1024),
    "vit_huge_patch14_clip_quickgelu_224": _row(H, 14, 224, CLIP_QUICK, num_classes=1024),
    "vit_giant_patch14_clip_224": _row(g, 14, 224, CLIP, num_classes=1024),
    "vit_gigantic_patch14_clip_224": _row(G, 14, 224, CLIP, num_classes=1280),
    "vit_gigantic_patch14_clip_quickgelu_224": _row(G, 14, 224, CLIP_QUICK, num_classes=1280),
    "vit_base_patch16_siglip_224": _row(B, 16, 224, SIGLIP),
    "vit_base_patch16_siglip_256": _row(B, 16, 256, SIGLIP),
    "vit_base_patch16_siglip_384": _row(B, 16, 384, SIGLIP),
    "vit_base_patch16_siglip_512": _row(B, 16, 512, SIGLIP),
    "vit_base_patch32_siglip_256": _row(B, 32, 256, SIGLIP2),
    "vit_large_patch16_siglip_256": _row(L, 16, 256, SIGLIP),
    "vit_large_patch16_siglip_384": _row(L, 16, 384, SIGLIP),
    "vit_large_patch16_siglip_512": _row(L, 16, 512, SIGLIP2),
    "vit_so400m_patch14_siglip_224": _row(So400m, 14, 224, SIGLIP),
    "vit_so400m_patch14_siglip_378": _row(So400m, 14, 378, SIGLIP),
    "vit_so400m_patch14_siglip_384": _row(So400m, 14, 384, SIGLIP),
    "vit_so400m_patch16_siglip_256": _row(So400m, 16, 256, SIGLIP2),
    "vit_so400m_patch16_siglip_384": _row(So400m, 16, 384, SIGLIP2),
    "vit_so400m_patch16_siglip_512": _row(So400m, 16, 512, SIGLIP2),
    "vit_giantopt_patch16_siglip_256": _row(g_opt, 16, 256, SIGLIP2),
    "vit_giantopt_patch16_siglip_384": _row(g_opt, 16, 384, SIGLIP2),
}


def get_variant(name: str) -> Variant:
    """The row of that name.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest ones.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        suggestion = f"did you mean {', '.join(near)}?" if near else "see fastvit.list_models()"
        raise ValueError(f"unknown variant {name!r}; {suggestion}")
    return VARIANTS[name]


def list_models() -> list[str]:
    """The names that ``create_model`` knows."""
    return list(VARIANTS)


def create_model(name: str, checkpoint: str | PathLike | None = None, **overrides) -> VisionTransformer:
    """Build a variant, with weights from a file if one is given.

    Args:
        name: a row of ``VARIANTS``; the names are timm's.
        checkpoint: a safetensors file or a torch.save file in timm's keys, loaded strictly. The model is
            first built with the file's own grid of positions and number of classes; then ``img_size`` and
            ``num_classes``, if given, are applied: positions are resized as ``pos_resize`` says, and another
            number of classes, or any for a file without a classifier, starts from a new one.
        overrides: arguments of ``VisionTransformer``.

    Returns:
        The model, with ``pretrained_cfg`` as timm's data utilities read it.

    Raises:
        ValueError: for an unknown name.
        CheckpointError: if the file cannot be read or does not fit.
    """
    variant = get_variant(name)
    wanted = variant.arguments | overrides
    if checkpoint is None:
        model = VisionTransformer(**wanted)
    else:
        state = read_state_dict(checkpoint)
        model = VisionTransformer(**wanted | _sizes_of(state, variant, overrides))
        load_state(model, state, checkpoint)
        if model.patch_embed.img_size != to_2tuple(wanted["img_size"]):
            logger.info(
                "%s: positions resized to %s, %s's way", checkpoint, wanted["img_size"], model.pos_resize
            )
            model.set_input_size(wanted["img_size"])
        if "num_classes" in overrides and wanted["num_classes"] != model.num_classes:
            logger.info("%s: %d classes give way to %d", checkpoint, model.num_classes, wanted["num_classes"])
            model.reset_classifier(wanted["num_classes"])
    model.pretrained_cfg = model.default_cfg = _data_config(name, variant, model)
    return model


def _sizes_of(state: Mapping[str, Tensor], variant: Variant, overrides: dict[str, Any]) -> dict[str, Any]:
    """The number of classes and the image size that the file's own tensors speak of."""
    sizes: dict[str, Any] = {}
    head = state.get("head.weight")
    if head is not None and head.ndim == 2:
        sizes["num_classes"] = head.shape[0]
    elif "num_classes" in overrides:
        sizes["num_classes"] = 0
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return sizes
    arguments = variant.arguments | overrides
    prefix = int(arguments.get("class_token", True)) + arguments.get("reg_tokens", 0)
    num_patches = positions.shape[1] - (0 if arguments.get("no_embed_class", False) else prefix)
    ph, pw = to_2tuple(arguments["patch_size"])
    side = math.isqrt(max(num_patches, 0))
    # The variant's own size, else the one asked for, else a square: whichever has as many patches.
    for size in (variant.arguments["img_size"], arguments["img_size"], (side * ph, side * pw)):
        height, width = to_2tuple(size)
        if (height // ph) * (width // pw) == num_patches > 0:
            return sizes | {"img_size": size}
    return sizes


def _data_config(name: str, variant: Variant, model: VisionTransformer) -> dict[str, Any]:
    return {
        "architecture": name,
        "input_size": (model.in_chans, *model.patch_embed.img_size),
        "fixed_input_size": not model.dynamic_img_size,
        "interpolation": "bicubic",
        "crop_pct": variant.crop_pct,
        "mean": variant.family.mean,
        "std": variant.family.std,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
