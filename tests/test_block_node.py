"""Blocks that record gradients by one node: bits and errors are those of the nodes of the ops."""

import gc
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import timm
import torch
from direct_blocks import DIM, KERNELS, TOKENS, block, kernels_by_torch, ordinary, tokens
from timm.layers import LayerNorm, SwiGLU
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import backends, triton_backend
from fastvit.layers import direct
from fastvit.ops import block_node
from fastvit_kernels import attention


@pytest.fixture(autouse=True)
def kernels():
    direct.forget()
    with fastvit.use_backend(**KERNELS), kernels_by_torch():
        yield
    direct.forget()


@pytest.fixture
def nodes():
    """How many blocks were recorded by one node."""
    with mock.patch.object(block_node, "run", mock.Mock(wraps=block_node.run)) as run:
        yield run


def step(made, *given, call=lambda made, *given: made(*given)):
    """The output, and every gradient; None for one that there is none of."""
    leaves = [*made.parameters(), *(g for g in given if g.is_floating_point())]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(5)
    out = call(made, *given)
    torch.manual_seed(6)
    out.backward(torch.randn_like(out))
    return [out.detach(), *(None if leaf.grad is None else leaf.grad.clone() for leaf in leaves)]


def same(found, expected):
    assert [t is None for t in found] == [t is None for t in expected]
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None]
    assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in pairs)


def twice(nodes, made, *given, **how):
    """The second call is by one node, and gives the bits of the ops' own nodes."""
    expected = ordinary(lambda: step(made, *given, **how))
    same(step(made, *given, **how), expected)
    before = nodes.call_count
    same(step(made, *given, **how), expected)
    assert nodes.call_count > before
    return expected


INTERPRETED = {name: getattr(attention, name) for name in ("attention_fwd", "attention_bwd")}
HOWS = {
    "plain": {},
    "without biases": {"qkv_bias": False, "proj_bias": False},
    "LayerScale": {"init_values": 0.5},
    "norms of q and k": {"qk_norm": True, "norm_layer": LayerNorm},
    "an inner norm, stochastic depth": {"scale_mlp_norm": True, "drop_path": 0.5},
    "a gate": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
}


@pytest.mark.parametrize("how", HOWS)
def test_the_bits_of_the_ops_own_nodes(nodes, how):
    made = block("train", **HOWS[how]).train()
    expected = twice(nodes, made, tokens(4).requires_grad_())
    assert all(grad is not None for grad in expected)


def test_on_the_kernels(nodes):
    with mock.patch.multiple(attention, **INTERPRETED):
        twice(nodes, block("train", qk_norm=True, norm_layer=LayerNorm), tokens().requires_grad_())


@pytest.mark.parametrize("kind", ["tokens", "norm1", "attn.qkv", "norm1+mlp"])
def test_what_needs_no_gradient_gets_none(nodes, kind):
    made, x = block("train").train(), tokens(2)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(any(name.startswith(part) for part in kind.split("+")))
    x.requires_grad_(kind == "tokens")
    given = twice(nodes, made, x)
    count = sum(parameter.requires_grad for parameter in made.parameters()) + (kind == "tokens")
    assert sum(grad is not None for grad in given) == 1 + count


@pytest.mark.parametrize("kind", ["mlp", "attn.proj", "norm2", ""])
def test_where_the_first_op_records_nothing_each_op_is_asked(nodes, kind):
    made, x = block("train"), tokens(2)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(bool(kind) and name.startswith(kind))
    for _ in range(2):
        out = made(x)
        assert out.requires_grad == bool(kind)
    nodes.assert_not_called()
    assert torch.equal(out, ordinary(lambda: made(x)))


def test_where_nothing_is_recorded_gradients_that_are_enabled_cost_nothing():
    made, x = block("train").requires_grad_(False), tokens(2)
    made(x)
    with mock.patch.object(backends, "resolve", side_effect=AssertionError):
        assert not made(x).requires_grad


@pytest.mark.parametrize("how", ["plain", "LayerScale", "a gate"])
def test_autocast(nodes, how, monkeypatch):
    monkeypatch.setattr(triton_backend, "_machine", lambda tensor: None)  # no interpreter: torch in its place
    made = block("train", **HOWS[how]).train()
    with torch.autocast("cpu", torch.bfloat16):
        given = twice(nodes, made, tokens(4).requires_grad_())
    assert all(grad.dtype == torch.float32 for grad in given)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_rotary_positions(nodes, half):
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": DIM, "num_heads": 2, "img_size": 32, "patch_size": 16}
    model = timm.models.eva.Eva(**sizes, num_classes=0, use_rot_pos_emb=True, rope_rotate_half=half)
    twice(nodes, fastvit.accelerate(model.train(), "train"), torch.randn(2, 3, 32, 32))


def test_masks(nodes):
    mask = torch.rand(2, 1, TOKENS, TOKENS) > 0.3
    twice(nodes, block("train"), tokens(2), call=lambda made, x: made(x, attn_mask=mask))


def test_projections_that_lie_apart(nodes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=16))
    made = fastvit.accelerate(model.train(), "train")
    twice(nodes, made, torch.randn(2, 3, 32, 32), call=lambda made, x: made(x).last_hidden_state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(nodes, reentrant):
    made = block("train", drop_path=0.5).train()
    twice(
        nodes,
        made,
        tokens(4).requires_grad_(),
        call=lambda made, x: checkpoint(made, x, use_reentrant=reentrant),
    )


@pytest.mark.parametrize("hooks", [nullcontext, save_on_cpu])
def test_graphs_that_are_kept_and_hooks_on_what_is_saved(nodes, hooks):
    made, x = block("train").train(), tokens(2).requires_grad_()
    seen = []
    made.mlp.fc1.weight.register_hook(lambda grad: seen.append(grad.clone()))
    made(x)
    with hooks():
        out = made(x)
    assert nodes.call_count == 1
    first = torch.autograd.grad(out.sum(), [x, *made.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *made.parameters()])
    assert all(map(torch.equal, first, second))
    assert len(seen) == 2


@pytest.mark.parametrize("how", HOWS)
def test_no_more_is_saved(how):
    made, x = block("train", **HOWS[how]), tokens(2)
    made(x)

    def saved(call):
        seen = {}
        with saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            out = call()
        return out, sorted(tensor.nbytes for tensor in seen.values())

    (_, expected), (_, found) = saved(lambda: ordinary(lambda: made(x))), saved(lambda: made(x))
    assert found == expected


def test_a_weight_that_was_written_to_is_an_error():
    made, x = block("train").train(), tokens(2)
    for _ in range(2):
        out = made(x)
    with torch.no_grad():
        made.mlp.fc2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_an_error():
    made, x = block("train"), tokens(2).requires_grad_()
    for _ in range(2):
        out = made(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_what_was_saved_is_let_go():
    made, x = block("train").train(), tokens(2).requires_grad_()
    for _ in range(2):
        out = made(x)
    saved = [weakref.ref(tensor) for tensor in out.grad_fn.saved_tensors if tensor is not None]
    ours = {id(p) for p in made.parameters()} | {id(x)}
    out.sum().backward()
    del out
    gc.collect()
    assert all(ref() is None or id(ref()) in ours for ref in saved)


def test_what_changes_is_followed(nodes):
    made, x = block("train", drop_path=0.5).train(), tokens(4).requires_grad_()
    twice(nodes, made, x)
    made.drop_path1.drop_prob = 0.25
    twice(nodes, made, x)
    made.eval()
    twice(nodes, made, x)
    made.norm1.requires_grad_(False)
    twice(nodes, made, x)
    before = nodes.call_count
    with torch.no_grad():
        assert torch.equal(made(x), ordinary(lambda: made(x)))
    made.attn.qkv.register_forward_hook(lambda module, args, out: out * 2)
    doubled = step(made, x)
    assert nodes.call_count == before
    same(doubled, ordinary(lambda: step(made, x)))


def test_frozen_weights_and_checkpointed_mlps_record_by_the_ops(nodes):
    x = tokens(2)
    for made in (block("inference"), fastvit.accelerate(block("train"), "train", checkpoint="mlp")):
        expected = ordinary(lambda made=made: step(made, x))
        for _ in range(2):
            same(step(made, x), expected)
    nodes.assert_not_called()
