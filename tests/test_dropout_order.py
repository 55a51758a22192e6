"""The same seed drops the same activations as in the untouched model, whatever lies before the dropout.

Dropout draws in the order in which its tensor lies in memory: a fused op whose result lies otherwise than the
library's would make it drop others.
"""

import copy

import pytest
import timm
import torch
from accelerated import KINDS, SMALL, close, images
from torch import nn

import fastvit
from fastvit.verification import randomize

AVERAGE = {"class_token": False, "global_pool": "avg"}
EMBEDDINGS = {
    "class token": {},
    "registers alone": AVERAGE | {"reg_tokens": 2},
    "registers behind positions": {"reg_tokens": 2, "no_embed_class": True},
    "no prefix": AVERAGE,
    "no prefix, any size": AVERAGE | {"dynamic_img_size": True},
    "no prefix, norm before": AVERAGE | {"pre_norm": True},
    "no prefix, attention pooling": {"class_token": False, "global_pool": "map"},
}
DROPOUTS = (
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
)
INPUTS = {
    "one": images(1),
    "three": images(3),
    "channels last": images(3).to(memory_format=torch.channels_last),
}


def seeded(model, x):
    torch.manual_seed(3)
    return model(x)


def embeddings_only(model):
    """What the first block would take: dropped positions are zeros."""
    model.blocks = nn.ModuleList() if isinstance(model.blocks, nn.ModuleList) else nn.Sequential()
    for name in ("norm", "norm_pre"):
        if hasattr(model, name):
            setattr(model, name, nn.Identity())
    return model.forward_features


def twins(kind, options):
    name, own = KINDS[kind]
    model = randomize(timm.create_model(name, **SMALL | own | options)).train()
    found = [model, fastvit.accelerate(copy.deepcopy(model))]
    if kind == "vit":
        found.append(fastvit.VisionTransformer(**SMALL | own | options).train())
        found[-1].load_state_dict(model.state_dict())
    return found


@pytest.mark.parametrize(
    ("kind", "embedding"),
    [*(("vit", embedding) for embedding in EMBEDDINGS), ("eva", "class token"), ("eva", "no prefix")],
)
def test_the_same_positions_are_zeros(kind, embedding):
    models = twins(kind, EMBEDDINGS[embedding] | {"pos_drop_rate": 0.3})
    forwards = [embeddings_only(model) for model in models]
    for x in INPUTS.values():
        expected, *found = [seeded(forward, x) for forward in forwards]
        zeros = expected == 0
        assert 0.2 < zeros.float().mean() < 0.4
        for out in found:
            assert torch.equal(out == 0, zeros)
            close(out, expected)


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("embedding", ["class token", "no prefix"])
def test_every_dropout_of_a_model_drops_the_same(embedding, kind, dropout):
    expected, *found = [
        seeded(model, INPUTS["three"]) for model in twins(kind, EMBEDDINGS[embedding] | {dropout: 0.3})
    ]
    for out in found:
        close(out, expected)


@pytest.mark.parametrize("dropout", ["dropout", "attention_dropout"])
def test_torchvision(dropout):
    from torchvision.models import VisionTransformer

    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 64,
        "mlp_dim": 96,
    }
    model = randomize(VisionTransformer(**sizes, num_classes=7, **{dropout: 0.3})).train()
    fast = fastvit.accelerate(copy.deepcopy(model))
    for x in INPUTS.values():
        close(seeded(fast, x), seeded(model, x))


@pytest.mark.parametrize("kind", ["ViT", "IJepa", "Dinov2"])
@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_transformers(kind, dropout):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=8, **{dropout: 0.3})
    model = randomize(getattr(transformers, f"{kind}Model")(config)).train()
    fast = fastvit.accelerate(copy.deepcopy(model))
    for x in INPUTS.values():
        found, expected = (seeded(each, x).last_hidden_state for each in (fast, model))
        close(found, expected)


def test_tokens_that_are_normalised_inside_are_dropped_alike():
    model, fast, own = twins("vit", AVERAGE | {"pos_drop_rate": 0.3})
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    raw = torch.rand(2, 3, 32, 32)
    column = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    expected = seeded(model, (raw - column[0]) / column[1])
    for each in (fast, own):
        close(seeded(fastvit.fold_normalize(each, mean, std), raw), expected)
