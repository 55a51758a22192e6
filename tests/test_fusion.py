"""A block runs as fused ops where that is the whole truth, and by modules where something was put inside."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from fastvit import VisionTransformer, ops
from fastvit.layers import Attention, Block, Mlp, SwiGLUPacked
from fastvit.verification import randomize

FUSED = Counter(layer_norm_linear=1, attention=1, linear_residual=1, layer_norm_mlp=1)
X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def block(**arguments) -> Block:
    return randomize(Block(24, 3, qkv_bias=True, **arguments)).eval()


@pytest.fixture
def calls(monkeypatch):
    """How often each op ran."""
    counter = Counter()
    for name in (*FUSED, "patch_embed"):
        original = getattr(ops, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counter[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    return counter


# The attention module's own forward calls the attention op too: only what lies around it changes.
def without(*names: str) -> Counter:
    return Counter({name: count for name, count in FUSED.items() if name not in names})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"drop_path": 0.1},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    ],
)
def test_plain_blocks_are_four_ops(calls, arguments):
    block(**arguments)(X)
    assert calls == FUSED


def test_the_embedding_is_one_op(calls):
    VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, reg_tokens=2)(
        torch.randn(1, 3, 32, 32)
    )
    assert calls == FUSED + Counter(patch_embed=1)


ATTENTION_PARTS = [
    "norm1",
    "attn",
    "attn.qkv",
    "attn.proj",
    "attn.proj_drop",
    "attn.attn_drop",
    "ls1",
    "drop_path1",
]
MLP_PARTS = [
    "norm2",
    "mlp",
    "mlp.fc1",
    "mlp.act",
    "mlp.fc2",
    "mlp.norm",
    "mlp.drop1",
    "mlp.drop2",
    "ls2",
    "drop_path2",
]
HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("part", [*ATTENTION_PARTS, *MLP_PARTS])
def test_a_hook_inside_fires_and_changes_no_number(calls, part, hook):
    model = block(init_values=0.1)
    expected, fired = model(X), []
    calls.clear()
    handle = getattr(model.get_submodule(part), hook)(lambda *args: fired.append(part))
    x = X.clone().requires_grad_()
    out = model(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert fired
    if part in MLP_PARTS:
        assert calls == without("layer_norm_mlp")
    elif part == "attn.attn_drop":
        assert calls == without("layer_norm_linear", "attention", "linear_residual")
    else:
        assert calls == without("layer_norm_linear", "linear_residual")
    handle.remove()
    calls.clear()
    model(X)
    assert calls == FUSED


@pytest.mark.parametrize("part", ["attn.q_norm", "attn.k_norm"])
def test_a_hook_on_the_qk_norm_fires(calls, part):
    model = block(qk_norm=True)
    expected, fired = model(X), []
    calls.clear()
    model.get_submodule(part).register_forward_hook(lambda *args: fired.append(part))
    torch.testing.assert_close(model(X), expected)
    assert fired == [part]
    assert calls == without("layer_norm_linear", "attention", "linear_residual")
    masked = torch.zeros(
        5, 5, dtype=torch.bool
    )  # torch's fused attention gives zeros, its formula would give NaN
    assert model(X, attn_mask=masked).isfinite().all()


def test_a_hook_on_every_module_sees_every_module():
    model = block(init_values=0.1, drop_path=0.1)
    seen = set()
    handle = register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        model(X)
    finally:
        handle.remove()
    assert seen >= set(model.modules())


class LoRA(nn.Module):
    """A linear with a low-rank update, as adapters put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_replaced_linear_is_used(part):
    model = block()
    before = model(X)
    model.set_submodule(part, LoRA(model.get_submodule(part)))
    out = model(X)
    assert not torch.allclose(out, before)
    out.sum().backward()
    assert model.get_submodule(part).up.grad.any()


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"])
def test_a_parametrised_weight_is_used(part):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    model, halved = block(), block()
    with torch.no_grad():
        halved.get_submodule(part).weight /= 2
    parametrize.register_parametrization(model.get_submodule(part), "weight", Half())
    torch.testing.assert_close(model(X), halved(X))


@pytest.mark.parametrize("part", ["attn.qkv", "mlp.fc1"])
def test_a_pruned_weight_is_used(part):
    model, pruned = block(), block()
    prune.l1_unstructured(model.get_submodule(part), "weight", amount=0.5)
    with torch.no_grad():
        pruned.get_submodule(part).weight.copy_(model.get_submodule(part).weight)
    torch.testing.assert_close(model(X), pruned(X))


def test_a_patched_forward_is_called():
    model = block()
    model.mlp.fc2.forward = lambda x: torch.zeros(*x.shape[:-1], 24)
    torch.testing.assert_close(model(X), model._attention_half(X, None, False))


def test_a_subclass_with_its_own_forward_is_called():
    class Doubled(SwiGLUPacked.func):
        def forward(self, x):
            return 2 * super().forward(x)

    arguments = {"act_layer": nn.SiLU}
    plain = block(mlp_layer=SwiGLUPacked, **arguments)
    doubled = block(mlp_layer=lambda **kw: Doubled(**kw, gate_last=False), **arguments)
    doubled.load_state_dict(plain.state_dict())
    half = plain._attention_half(X, None, False)
    torch.testing.assert_close(doubled(X) - half, 2 * (plain(X) - half))


def test_dropout_at_work_goes_module_by_module(calls):
    block(proj_drop=0.5).train()(X)
    assert calls == without("layer_norm_linear", "linear_residual", "layer_norm_mlp")
    calls.clear()
    block(proj_drop=0.5)(X)
    assert calls == FUSED


class Twice(torch.Tensor):
    """A weight whose type has its own idea of a linear layer, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *rest = args
            return function(x, 2 * weight.as_subclass(torch.Tensor), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_weight_of_a_type_of_its_own_is_used(part):
    model, doubled = block(), block()
    layer = model.get_submodule(part)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice))
    with torch.no_grad():
        doubled.get_submodule(part).weight *= 2
    torch.testing.assert_close(model(X), doubled(X))


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"])
def test_weights_that_are_no_longer_parameters(part):
    """As FSDP and DataParallel leave them: views, kept as ordinary attributes."""
    model = block()
    expected, layer = model(X), model.get_submodule(part)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("layer", [nn.Linear, nn.LayerNorm, Attention, Mlp])
def test_a_forward_patched_for_the_whole_process_is_called(layer, monkeypatch):
    model, original, calls = block(), layer.forward, []
    expected = model(X)

    def patched(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    if layer is nn.LayerNorm:
        model.norm1 = nn.LayerNorm(24, eps=1e-6)
        expected = model(X)
    monkeypatch.setattr(layer, "forward", patched)
    torch.testing.assert_close(model(X), expected)
    assert calls


def test_attention_weights_can_be_seen():
    model = block(qk_norm=True)
    expected, maps = model(X), []
    model.attn.fused_attn = False
    model.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
    torch.testing.assert_close(model(X), expected)
    assert maps[0].shape == (2, 3, 5, 5)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 5))
    mask = torch.rand(5, 5) > 0.4
    mask.fill_diagonal_(True)
    for masks in ({"attn_mask": mask}, {"attn_mask": torch.randn(5, 5)}, {"is_causal": True}):
        model.attn.fused_attn = True
        model.attn.attn_drop = nn.Dropout()
        expected = model.eval()(X, **masks)
        model.attn.fused_attn = False
        torch.testing.assert_close(model(X, **masks), expected)


def test_norms_kept_in_float32_in_a_half_precision_block(calls):
    model = block().bfloat16()
    for norm in (model.norm1, model.norm2):
        norm.float()
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    assert calls == without("layer_norm_linear", "linear_residual", "layer_norm_mlp")
    torch.testing.assert_close(out.float(), block()(X), rtol=0.1, atol=0.1)
