"""Each of torch's GEMM libraries serves the output and the gradients, and what it cannot serve is torch's."""

import pytest
import torch
import torch.nn.functional as F

from fastvit.gemm_libraries import gemm_libraries

LIBRARIES = dict(gemm_libraries("cpu"))
needs_onednn = pytest.mark.skipif("onednn" not in LIBRARIES, reason="this torch has no oneDNN")


def _linear(x_shape=(2, 5, 24), out=7, dtype=torch.float32, bias=True):
    x, weight = torch.randn(x_shape), torch.randn(out, x_shape[-1])
    tensors = (x, weight, torch.randn(out)) if bias else (x, weight)
    return [t.to(dtype).requires_grad_() for t in tensors]


def _operators(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_shape", [(24,), (5, 24), (2, 5, 24), (0, 24)], ids=str)
def test_output_and_gradients_are_a_linear_layers(library, bias, x_shape):
    tensors = _linear(x_shape, bias=bias)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with LIBRARIES[library]():
        out = F.linear(*tensors)
    truth = F.linear(*exact)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out).mT.contiguous().mT if out.dim() > 1 else torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(truth, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_onednn_runs_all_three_products_and_no_other_library_does():
    tensors = _linear()

    def step():
        with LIBRARIES["onednn"]():
            F.linear(input=tensors[0], weight=tensors[1], bias=tensors[2]).sum().backward()

    used = _operators(step)
    assert "mkldnn::_linear_pointwise" in used
    assert not used & {"aten::mm", "aten::addmm", "aten::linear"}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    tensors = _linear(dtype=dtype)
    with LIBRARIES["onednn"]():
        out = F.linear(*tensors)
    assert out.equal(F.linear(*tensors))


@needs_onednn
def test_autocast_is_left_to_torch():
    with LIBRARIES["onednn"](), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(*_linear()).dtype == torch.bfloat16


def test_a_device_without_a_choice_has_its_own_library_alone():
    assert [name for name, _ in gemm_libraries("meta")] == ["default"]
