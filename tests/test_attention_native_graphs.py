"""attention in the CPU library as torch sees it: registered, traced, compiled and exported."""

import op_cases
import pytest
import torch
from native_calls import needs_library
from test_op_compile import compiled_for_any_batch
from torch import nn
from torch._subclasses import FakeTensorMode

from fastvit import ops, use_backend

pytestmark = needs_library()
FP32 = torch.float32


@pytest.fixture(autouse=True)
def _cpp():
    torch.compiler.reset()
    with torch.no_grad(), use_backend(attention="cpp"):
        yield


def test_is_a_well_behaved_torch_op():
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    mask = torch.randn(9, 9).expand(2, 3, 9, 9)
    for arguments in ((q, k, v, None, True, 0.3), (q, k.mT.contiguous().mT, v, mask, False, 1.0)):
        torch.library.opcheck(torch.ops.fastvit.attention_cpp_fwd, arguments)


def test_compiles_whole_and_once_for_every_batch():
    compiled_once = compiled_for_any_batch(ops.attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            call = op_cases.build("attention", dtype=FP32, batch=batch, **op_cases.FULL["attention"])
            torch.testing.assert_close(compiled_once(**call), ops.attention(**call))


def test_exports_as_one_op():
    class Layer(nn.Module):
        def forward(self, qkv):
            return ops.attention(qkv, 2)

    program = torch.export.export(Layer(), (torch.randn(2, 9, 48),))
    names = [str(node.target) for node in program.graph.nodes if "fastvit" in str(node.target)]
    assert names == ["fastvit.attention_cpp_fwd.default"]


def test_answers_for_fake_tensors():
    call = op_cases.build("attention", dtype=FP32, **op_cases.FULL["attention"])
    real = ops.attention(**call)
    with FakeTensorMode() as mode:
        fake = ops.attention(**op_cases.converted(call, mode.from_tensor))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
