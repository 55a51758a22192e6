"""explain on hooked, pruned, adapted, parametrised and dropping models of four libraries.

Each fallback is a row, the rows are what a run does, and coverage is the share of the model's
blocks that ran on ops alone.
"""

import copy

import pytest
import timm
import torch
import transformers as hf
from accelerated import SMALL
from huggingface_models import MLP
from library_models import open_clip_model, torchvision_model
from library_parity import named
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastvit
from fastvit.recording import recording
from fastvit.verification import randomize

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _timm(**rates):
    return timm.create_model("vit_tiny_patch16_224", **SMALL, init_values=0.1, **rates)


# How to build each, what its second block is called, and in it a projection of attention and of the MLP.
LIBRARIES = {
    "timm": (_timm, "blocks.1", "attn.proj", "mlp.fc1"),
    "transformers": (lambda: hf.ViTModel(hf.ViTConfig(**MLP)), "layers.1", "attention.o_proj", "mlp.fc1"),
    "torchvision": (
        lambda: torchvision_model()[0],
        "encoder.layers.encoder_layer_1",
        "self_attention.out_proj",
        "mlp.0",
    ),
    "open_clip": (
        lambda: open_clip_model()[0].visual,
        "transformer.resblocks.1",
        "attn.out_proj",
        "mlp.c_fc",
    ),
}


class LoRA(nn.Module):
    """A linear layer with a low-rank update, as adapters put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def hooked(block, projection, _):
    block.get_submodule(projection).register_forward_pre_hook(lambda *_: None)
    return f"{projection.split('.')[-1]} carries a hook"


def pruned(block, _, fc):
    prune.l1_unstructured(block.get_submodule(fc), "weight", 0.3)
    return f"{fc.split('.')[-1]} carries a hook"


def adapted(block, _, fc):
    block.set_submodule(fc, LoRA(block.get_submodule(fc)))
    return f"{fc.split('.')[-1]} is a {LoRA.__module__}.LoRA"


def parametrised(block, _, fc):
    parametrizations.weight_norm(block.get_submodule(fc))
    return f"{fc.split('.')[-1]} is a torch.nn.utils.parametrize.ParametrizedLinear"


def dropping(block, *_):
    """What follows attention, or where nothing does what follows the activation."""
    block.train()
    found = [name for name in ("attn.proj_drop", "dropout") if name in dict(block.named_modules())]
    if found:
        block.get_submodule(found[0]).p = 0.5
        return f"{found[0].split('.')[-1]} drops activations (p = 0.5, in training)"
    block.mlp.gelu = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    return "gelu is a torch.nn.modules.container.Sequential"


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request):
    make, *names = LIBRARIES[request.param]
    torch.manual_seed(0)
    return randomize(make()).eval(), *names


@pytest.mark.parametrize("edit", [hooked, pruned, adapted, parametrised, dropping])
def test_rows_are_complete_and_coverage_is_right(library, edit):
    model, name, projection, fc = library
    model, fast = copy.deepcopy(model), fastvit.accelerate(copy.deepcopy(model))
    outputs = []
    for each in (model, fast):
        torch.manual_seed(2)
        reason = edit(each.get_submodule(name), projection, fc)
        with torch.no_grad(), recording() as recorder:
            outputs.append(dict(named(each(X))))
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value, rtol=1e-4, atol=1e-4)
    rows = fastvit.explain(fast, X).rows
    assert [(row.op, row.backend, row.reason) for row in rows if row.op == "forward"] == [
        ("forward", "original", reason)
    ]
    assert [row.op for row in rows if row.op != "forward"] == [e.op for e in recorder.events if e.op]
    assert [row.module for row in rows if row.op == "forward"] == [name]
    explanation = fastvit.explain(fast, X, arch="sm_90")
    assert explanation.coverage.blocks == 0.5
    assert 0.3 < explanation.coverage.flops < 0.6
    assert fastvit.explain(fastvit.restore(fast)).coverage.blocks == 0.0
