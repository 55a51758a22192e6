"""What `accelerate` leaves as it was in other libraries' models, and what it sees that is changed later."""

import copy
import io
import pickle

import pytest
import torch
from huggingface_models import build
from library_models import open_clip_model, torchvision_model
from library_parity import events, named, pair, reasons, same
from timm.models.eva import EvaBlock
from torch import nn

import fastvit
from fastvit.verification import randomize

# A model of each family: how it is built and called, one of its blocks, a linear layer in it that is used.
FAMILIES = {
    "vit": (lambda: build("vit"), "vit.layers.1", "mlp.fc1"),
    "dinov2 with registers": (lambda: build("dinov2 with registers"), "encoder.layer.1", "attention.q_proj"),
    "dinov3": (lambda: build("dinov3"), "model.layer.1", "attention.o_proj"),
    "clip": (lambda: build("clip"), "vision_model.encoder.layers.1", "self_attn.v_proj"),
    "siglip": (lambda: build("siglip"), "text_model.encoder.layers.0", "mlp.fc2"),
    "torchvision": (torchvision_model, "encoder.layers.encoder_layer_1", "mlp.0"),
    "open_clip": (open_clip_model, "visual.transformer.resblocks.0", "mlp.c_proj"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, block, linear = FAMILIES[request.param]
    model, call = make()
    original, ours = pair(model)
    return original, ours, call, block, linear


@pytest.fixture
def fresh(family):
    """The same, to be changed."""
    original, ours, call, block, linear = family
    return copy.deepcopy(original), copy.deepcopy(ours), call, block, linear


@torch.no_grad()
def test_restored_it_is_the_model_it_was(fresh):
    original, ours, call, *_ = fresh
    changed = {name for name, m in ours.named_modules() if type(m) is not type(original.get_submodule(name))}
    assert len(changed) >= 3
    assert list(ours.state_dict()) == list(original.state_dict())
    assert repr(ours) == repr(original)
    assert all(isinstance(m, type(original.get_submodule(name))) for name, m in ours.named_modules())
    assert fastvit.restore(ours) is ours
    assert {n: type(m) for n, m in ours.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert [vars(m).keys() for m in ours.modules()] == [vars(m).keys() for m in original.modules()]
    for name, value in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    same_bits(ours(**call), original(**call))


def same_bits(a, b):
    pairs = zip(named(a), named(b), strict=True)
    assert all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in pairs)


@torch.no_grad()
def test_copies_and_pickles_are_accelerated_too(family):
    _, ours, call, *_ = family
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    expected = ours(**call)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        same_bits(other(**call), expected)


@torch.no_grad()
def test_hooks_inside_a_block_fire_and_those_on_it_do_not_hinder(fresh):
    _, ours, call, block, linear = fresh
    fired = []
    ours.get_submodule(block).register_forward_hook(lambda *_: fired.append("block"))
    assert not reasons(ours, **call)
    inner = ours.get_submodule(block).get_submodule(linear)
    handle = inner.register_forward_hook(lambda *_: fired.append("inner"))
    name = linear.partition(".")[2] or linear
    assert reasons(ours, **call) == {f"{name} carries a hook"}
    assert fired == ["block", "inner", "block"]
    handle.remove()
    assert not reasons(ours, **call)


class LoRA(nn.Module):
    """A linear layer with an addition of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 4)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@torch.no_grad()
def test_a_replaced_linear_layer_is_used(fresh):
    original, ours, call, block, linear = fresh
    before = ours(**call)
    lora = LoRA(original.get_submodule(block).get_submodule(linear))
    for model in (original, ours):
        model.get_submodule(block).set_submodule(linear, copy.deepcopy(lora))
    assert len(reasons(ours, **call)) == 1
    same(ours(**call), original(**call))
    with pytest.raises(AssertionError):
        same(ours(**call), before)


# Folded and joined weights are copies: each way to change what they were made of must reach them.
@torch.no_grad()
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_changed_weights_are_used(family, mode):
    original, _, call, *_ = family
    original = copy.deepcopy(original)
    ours = fastvit.accelerate(copy.deepcopy(original), mode=mode)
    with fastvit.use_backend("cpp"):
        same(ours(**call), original(**call))
        for model in (original, ours):
            for parameter in model.parameters():
                parameter.mul_(1.02).add_(0.001)
        same(ours(**call), original(**call))
        state = {name: value * 1.01 for name, value in original.state_dict().items()}
        for model in (original, ours):
            model.load_state_dict(state)
        same(ours(**call), original(**call))


def test_an_optimizers_step_is_used(fresh):
    original, ours, call, *_ = fresh
    with torch.no_grad():
        ours(**call)
    for model in (original, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    with torch.no_grad():
        same(ours(**call), original(**call))


@torch.no_grad()
def test_in_double_precision(fresh):
    original, ours, call, *_ = fresh
    call = {n: v.double() if v.is_floating_point() else v for n, v in call.items()}
    same(ours.double()(**call), original.double()(**call))
    assert not reasons(ours, **call)


# One of each way to hold attention; the others differ in names alone.
@pytest.mark.parametrize("name", ["vit", "dinov3", "torchvision"])
def test_it_compiles_as_one_graph(name):
    model, call = FAMILIES[name][0]()
    original, ours = pair(model)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(compiled(**call), original(**call))
    torch.compiler.reset()


# torch.fx runs the original forward: a joined weight it would keep as it is while it traces.
def test_torch_fx_keeps_no_joined_weight():
    block = randomize(EvaBlock(64, 2, qkv_fused=False, qkv_bias=True)).eval()
    ours = fastvit.accelerate(nn.Sequential(block))
    traced = torch.fx.symbolic_trace(ours)
    x = torch.randn(2, 5, 64)
    same(traced(x), ours(x))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    same(traced(x), ours(x))


def test_accelerating_twice_changes_nothing(fresh):
    _, ours, call, *_ = fresh
    kinds = [type(module) for module in ours.modules()]
    assert [type(module) for module in fastvit.accelerate(ours, strict=True).modules()] == kinds
    assert not reasons(ours, **call)
    assert "attention" in events(ours, **call)
