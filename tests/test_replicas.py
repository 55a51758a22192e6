"""Models whose modules have no parameters: replicas of nn.DataParallel, and what FSDP flattens."""

import copy

import pytest
import torch
from accelerated import close, fallbacks, pair, run
from huggingface_models import build
from library_models import open_clip_model, torchvision_model
from library_parity import pair as library_pair
from library_parity import same
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import fastvit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def replica(model):
    """What nn.DataParallel runs on a GPU: parameters are ordinary attributes, plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        copied._modules |= {name: copies.get(child) for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter * 1)
    replicated = copies[model]
    assert not list(replicated.parameters())
    return replicated


def _hooked(model):
    model.patch_embed.proj.register_forward_hook(lambda *_: None)


def _own_norm(model):
    model.patch_embed.norm = nn.LayerNorm(64)


def _patched(model):
    forward = model.patch_embed.forward
    model.patch_embed.forward = lambda *args: forward(*args)


REASONS = {"nothing": lambda model: None, "a hook": _hooked, "a norm": _own_norm, "a patch": _patched}


def normalising(kind, change, dtype):
    """A model, and one that normalises by itself, with a change that keeps the op from serving."""
    if kind == "fastvit":
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
        model = fastvit.VisionTransformer(**sizes, num_classes=7).to(dtype).eval()
        fast = copy.deepcopy(model)
    else:
        model, fast = pair(kind, depth=1)
        model, fast = model.to(dtype), fast.to(dtype)
    for each in (model, fast):
        change(each)
        each.patch_embed.norm.to(dtype)
    return model, fastvit.fold_normalize(fast, MEAN, STD)


def normalized(dtype):
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (MEAN, STD))
    return (PIXELS.to(dtype) / 255 - mean) / std


@pytest.mark.parametrize("kind", ["vit", "eva", "fastvit"])
@pytest.mark.parametrize("change", REASONS.values(), ids=REASONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_normalise(kind, change, dtype):
    model, fast = normalising(kind, change, dtype)
    wanted = run(model, normalized(dtype))[0]
    for each in (fast, replica(fast)):
        out, events = run(each, PIXELS)
        close(out, wanted)
        assert bool(fallbacks(events)) == (change is not REASONS["nothing"])


def test_images_to_be_padded():
    model, fast = pair(depth=1, dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.randn(2, 3, 30, 32)
    wanted = run(model, images)[0]
    for each in (fast, replica(fast)):
        out, events = run(each, images)
        close(out, wanted)
        assert fallbacks(events) == ["the images are not of whole patches"]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("change", REASONS.values(), ids=REASONS)
def test_fsdp1(group, change):
    model, fast = normalising("vit", change, torch.float32)
    wanted = run(model, normalized(torch.float32))[0]
    sharded = FullyShardedDataParallel(fast, device_id=torch.device("cpu"))
    assert len(list(sharded.parameters())) == 1
    out, events = run(sharded, PIXELS)
    close(out, wanted)
    assert bool(fallbacks(events)) == (change is not REASONS["nothing"])


LIBRARIES = {
    "transformers": lambda: build("dinov2"),
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
}


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_replicas_of_other_libraries(make, backend):
    model, call = make()
    original, ours = library_pair(model)
    with torch.no_grad(), fastvit.use_backend(layer_norm_mlp=backend):
        same(replica(ours)(**call), replica(original)(**call))
        same(replica(ours)(**call), original(**call))
