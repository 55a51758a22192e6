"""timm models, small and with weights that matter, beside what `accelerate` makes of them."""

import copy

import timm
import torch

import fastvit
from fastvit import recording
from fastvit.verification import randomize

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
KINDS = {
    "vit": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "eva": ("eva02_tiny_patch14_224", {}),
}


def pair(kind="vit", mode="train", **options):
    """A timm model in evaluation mode, and its accelerated copy."""
    name, own = KINDS[kind]
    model = randomize(timm.create_model(name, **SMALL | own | options)).eval()
    return model, fastvit.accelerate(copy.deepcopy(model), mode=mode)


def images(batch=3, size=32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def run(model, x):
    """Its output without gradients, and what was recorded of it."""
    with torch.no_grad(), recording.recording() as recorder:
        return model(x), recorder.events


def fallbacks(events):
    """The reasons of modules that ran their own forward."""
    return [event.reason for event in events if event.op is None]


def close(a, b, factor=1.0):
    """Within rounding in float32, and not the same by being zero."""
    assert b.abs().max() > 0.01
    torch.testing.assert_close(a, b, rtol=2e-5 * factor, atol=2e-5 * factor)
