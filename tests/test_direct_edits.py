"""No edit of a block goes unnoticed by the calls that ask nothing any more."""

import pytest
import torch
from direct_blocks import DIM, KERNELS, block, kernels_by_torch, ordinary, tokens
from timm.layers import Attention
from torch import nn
from torch.nn.utils import prune

import fastvit
from fastvit.layers import direct


@pytest.fixture(autouse=True)
def fresh():
    direct.forget()
    yield
    direct.forget()


@pytest.fixture
def quick():
    with kernels_by_torch():
        yield


class Typed(torch.Tensor):
    pass


def replaced(made, name, value):
    parent, _, last = name.rpartition(".")
    setattr(made.get_submodule(parent), last, value)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def hooked(made):
    made.attn.proj.register_forward_hook(lambda module, args, out: out + 1)


def pruned(made):
    prune.random_unstructured(made.mlp.fc1, "weight", 0.5)


def in_half(made):
    for parameter in made.parameters():
        parameter.data = parameter.data.half()


def typed(made):
    weight = nn.Parameter(made.mlp.fc2.weight.detach().as_subclass(Typed), requires_grad=False)
    made.mlp.fc2.weight = weight


EDITS = {
    "a hook": hooked,
    "pruning": pruned,
    "an activation": lambda made: replaced(made, "mlp.act", nn.SiLU()),
    "an unknown activation": lambda made: replaced(made, "mlp.act", Twice()),
    "a weight": lambda made: replaced(made, "attn.qkv.weight", nn.Parameter(torch.ones(3 * DIM, DIM))),
    "a weight's memory": lambda made: setattr(made.norm2.weight, "data", torch.full((DIM,), 3.0)),
    "numbers": lambda made: made.attn.proj.weight.data.mul_(2),
    "no bias": lambda made: replaced(made, "attn.proj.bias", None),
    "eps": lambda made: replaced(made, "norm1.eps", 0.5),
    "heads": lambda made: (replaced(made, "attn.num_heads", 4), replaced(made, "attn.head_dim", 8)),
    "a wider MLP": lambda made: replaced(made, "mlp", block(mlp_ratio=3.0).mlp),
    "a norm": lambda made: replaced(made, "norm2", nn.LayerNorm(DIM, eps=0.1)),
    "an identity": lambda made: replaced(made, "ls1", Twice()),
    "attention": lambda made: replaced(made, "attn", Attention(DIM, 4, qkv_bias=True)),
    "a patched forward": lambda made: replaced(made, "mlp.forward", lambda x: x),
    "another type": typed,
    "restore": fastvit.restore,
}


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_goes_unnoticed(quick, edit, mode):
    edited, twin, x = block(mode), block(mode), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            edited(x)
        before = edited(x)
        torch.manual_seed(2)
        EDITS[edit](edited)
        after = edited(x)
        torch.manual_seed(2)
        EDITS[edit](twin)
        assert torch.equal(after, ordinary(lambda: twin(x)))
        assert edit in ("restore", "another type") or not torch.equal(after, before)
        assert torch.equal(after, edited(x))
