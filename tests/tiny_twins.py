"""Vision transformers of every family, tiny, each beside an untouched twin of the same weights."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import open_clip
import timm
import timm_twins
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn

import fastvit
from fastvit import backends, derived
from fastvit.verification import randomize

WIDTH = 48
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "num_classes": 7}
HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWER = {"image_size": 32, "patch_size": 8, "width": WIDTH, "head_width": 24, "layers": 1}
WORDS = {"context_length": 12, "vocab_size": 50, "width": WIDTH, "heads": 2, "layers": 1}


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **TIMM | options)


def _torchvision() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": WIDTH}
    return torchvision.models.VisionTransformer(**sizes, mlp_dim=96, num_classes=7)


def _open_clip() -> nn.Module:
    vision = TOWER | {"ls_init_value": 0.5}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=WORDS).visual


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm": _timm("vit_tiny_patch16_224", init_values=0.1),
    "timm, q and v biases": _timm("eva02_tiny_patch14_224"),
    "timm, q, k, v apart": _timm("eva02_base_patch14_448"),
    "timm, dinov3": _timm("vit_small_patch16_dinov3"),
    "hf vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**HF, intermediate_size=96, num_labels=7)),
    "hf dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**HF, mlp_ratio=2, layerscale_value=0.5)),
    "hf clip": lambda: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**HF, intermediate_size=96, projection_dim=32)
    ),
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
OWN = ("own", "own, told nothing")


@cache
def _built(family: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(FAMILIES[family]()).eval()


@cache
def _own() -> tuple[nn.Module, nn.Module]:
    return timm_twins.twins("vit_tiny_patch16_224", **TIMM, init_values=0.1)


def pair(family: str, mode: str = "train", **options) -> tuple[nn.Module, nn.Module]:
    """An accelerated model and its twin, the library's own (timm's where the model is fastvit's)."""
    ours, twin = _own() if family in OWN else (_built(family),) * 2
    ours = copy.deepcopy(ours)
    if family != "own, told nothing":
        fastvit.accelerate(ours, mode, **options)
    return ours, copy.deepcopy(twin)


# "auto" is as FASTVIT_UNMEASURED has it, so that tiny models are served, and leaves Triton's interpreter out.
BACKENDS = {
    "reference": {"name": "reference"},
    "cpp": {"name": "cpp"},
    "auto": {"patch_embed": "reference", "attention": "reference"},
}


@contextmanager
def served_by(name: str) -> Iterator[None]:
    """Inside, ops run on that backend; before and after it nothing is kept of any weight."""
    before, backends._unmeasured = backends._unmeasured, name == "auto"
    derived.refresh()
    try:
        with fastvit.use_backend(**BACKENDS[name]):
            yield
    finally:
        backends._unmeasured = before
        derived.refresh()


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Its first output, of images in the dtype of its weights."""
    out = model(x.to(next(model.parameters()).dtype))
    return out if isinstance(out, Tensor) else out[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of a float32 model, in units of the largest number."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


def moved(before: Tensor, after: Tensor) -> float:
    """By how much an output has changed, in the same units: of a change that counts a hundred times that."""
    return float((after.double() - before.double()).abs().max() / before.abs().max())


def assert_same_weights(ours: nn.Module, twin: nn.Module) -> None:
    """The writer wrote the same: where this fails no copy is at fault."""
    theirs = dict(twin.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs[name]), f"the writer wrote another {name}"
