"""What the public ops on the Triton kernels keep and allocate: nothing but what the mathematics needs."""

import pytest
import torch
from test_triton_ops import FULL, build, leaves
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import ops, use_backend
from fastvit.ops import attention_triton, patch_embed_triton
from fastvit_kernels.launch import Launch


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


KERNELS = {
    "fastvit::attention_fwd": attention_triton._fwd_kernels,
    "fastvit::attention_bwd": attention_triton._bwd_kernels,
    "fastvit::patch_embed_fwd": patch_embed_triton._fwd_kernels,
    "fastvit::patch_embed_bwd": patch_embed_triton._bwd_kernels,
}


@pytest.fixture
def no_launches(monkeypatch):
    """Everything but the kernels themselves, whose interpreter makes copies of its own."""
    monkeypatch.setattr(Launch, "__call__", lambda launch: None)


class Allocations(TorchDispatchMode):
    """Counts what torch's own ops allocate, outside and inside ours: their names, and the bytes."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in KERNELS:
            with self:
                return KERNELS[name](*args)
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.made.append(name)
            self.bytes += result.nbytes
        return result


def saved(op, call):
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = getattr(ops, op)(**call)
    return out, list(kept.values())


def test_attention_saves_qkv_once_and_its_output():
    call = build("attention", **FULL["attention"])
    given = leaves("attention", call)
    out, kept = saved("attention", call | given)
    batch, tokens, _ = call["qkv"].shape
    own = [
        t
        for t in kept
        if not any(t is v or t.data_ptr() == v.data_ptr() for v in call.values() if torch.is_tensor(v))
    ]
    assert {t.data_ptr() for t in own} >= {out.data_ptr()}
    assert sorted(tuple(t.shape) for t in own) == sorted(
        [tuple(out.shape), (batch, call["num_heads"], tokens)]
    )


def test_patch_embed_saves_what_it_was_given():
    call = build("patch_embed")
    _, kept = saved("patch_embed", call | leaves("patch_embed", call))
    assert {t.data_ptr() for t in kept} == {call["images"].data_ptr(), call["weight"].data_ptr()}


@pytest.mark.parametrize("op", ["attention", "patch_embed"])
def test_nothing_is_saved_where_nothing_needs_a_gradient(op):
    call = build(op)
    with torch.no_grad():
        assert saved(op, call | leaves(op, call))[1] == []
    assert saved(op, call)[1] == []


@pytest.mark.parametrize("op", ["attention", "patch_embed"])
def test_forward_allocates_its_output_alone(op, no_launches):
    # 4 x 4 patches of 3 channels are a multiple of 8 pixels: the weight is read as it lies.
    call = build(op)
    with Allocations() as made, torch.no_grad():
        out = getattr(ops, op)(**call)
    assert made.bytes == out.nbytes, made.made


def test_the_packed_gradient_is_the_tensor_that_the_kernels_wrote(no_launches):
    call = build("attention")
    qkv = call["qkv"].requires_grad_()
    out = ops.attention(**call)
    grad = torch.ones_like(out)
    with Allocations() as made:
        (dqkv,) = torch.autograd.grad(out, qkv, grad)
    assert dqkv.shape == qkv.shape
    assert dqkv.is_contiguous()
    copies = {"aten::stack", "aten::cat", "aten::clone", "aten::copy_", "aten::add"} & set(made.made)
    assert not copies


def test_a_gradient_of_ones_is_not_written_out(no_launches):
    """.sum() gives stride 0: the kernels read it so."""
    out = ops.patch_embed(**(call := build("patch_embed")) | leaves("patch_embed", call))
    with Allocations() as made:
        out.sum().backward()
    assert not {"aten::clone", "aten::copy_"} & set(made.made)


# Bytes: mean and std are folded into the weight, in half precision.
def test_an_edit_of_the_weight_that_torch_records_nowhere_is_seen():
    call = build("patch_embed", dtype=torch.float16, **FULL["patch_embed"])
    with torch.no_grad():
        before = ops.patch_embed(**call)
        call["weight"].data.mul_(2)
        after = ops.patch_embed(**call)
        call["weight"].data.mul_(0.5)
        assert not torch.equal(after, before)
        assert torch.equal(ops.patch_embed(**call), before)
