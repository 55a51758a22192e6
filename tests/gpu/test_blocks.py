"""Blocks that go to their kernels at once, and record by one node: the bits of the ops one by one."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from gpu_calls import BACKENDS, LIBRARY, MODES, skip_on_a_cpu
from kernel_launches import DEVICE

from fastvit import use_backend
from fastvit.layers import direct
from fastvit.layers.block import Block
from fastvit.layers.settings import ATTRIBUTE, Settings
from fastvit.ops import block_node

pytestmark = LIBRARY
HOWS = {
    "plain": {},
    "scaled": {"init_values": 0.5, "qk_norm": True, "drop_path": 0.3},
}
TOKENS = (17, 197, 257) if DEVICE == "cuda" else (17,)


@pytest.fixture(autouse=True)
def _decided_anew():
    direct.forget()
    with use_backend(**BACKENDS):
        yield
    direct.forget()


def build(mode, how, frozen=False):
    """A block, its tokens, and the context it runs in."""
    autocast = mode == "autocast"
    dtype = torch.float32 if autocast else MODES[mode][0]
    if DEVICE == "cpu":
        skip_on_a_cpu("the interpreter is wrong in bfloat16" if autocast or mode == "bfloat16" else None)
        skip_on_a_cpu("the CPU's library has no float16" if mode == "float16" else None)
    torch.manual_seed(0)
    block = Block(128, 2, qkv_bias=True, **HOWS[how]).to(DEVICE, dtype)
    block.__dict__[ATTRIBUTE] = Settings(frozen=frozen)
    return block, dtype, torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext()


def ordinary(call):
    with mock.patch.object(direct, "_kind", return_value=None):
        return call()


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "float32", "autocast"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_inference(tokens, how, mode, frozen):
    block, dtype, context = build(mode, how, frozen)
    block.eval()
    x = torch.randn(2, tokens, 128, device=DEVICE, dtype=dtype)
    with torch.inference_mode(), context:
        expected = ordinary(lambda: block(x))
        for _ in range(3):
            assert torch.equal(block(x), expected)
        assert torch.equal(block(x + 1), ordinary(lambda: block(x + 1)))
    assert all(direct._known.values())


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "float32", "autocast"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_training(tokens, how, mode):
    block, dtype, context = build(mode, how)
    x = torch.randn(4, tokens, 128, device=DEVICE, dtype=dtype, requires_grad=True)
    leaves = [x, *block.parameters()]

    def step():
        torch.manual_seed(1)
        with context:
            out = block(x)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = ordinary(step)
    with mock.patch.object(block_node, "run", mock.Mock(wraps=block_node.run)) as nodes:
        for _ in range(3):
            assert all(map(torch.equal, step(), expected))
    assert nodes.call_count == 2
