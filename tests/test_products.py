"""The CPU's products beside the plain one: several weights side by side, LayerScale in the epilogue."""

import pytest
import torch
import torch.nn.functional as F
from native_calls import DTYPES, needs_library

from fastvit.ops import native

pytestmark = needs_library()
EVERY = [*DTYPES, torch.float64]
ROWS = [5, 40, 250]  # few, one block of them, two
WIDTHS = (96, 40, 33)
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 1e-13}


@pytest.fixture(params=[1, 2])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def of(dtype, *sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def near(found, truth):
    assert (found.double() - truth).abs().max() < TOLERANCES[found.dtype] * truth.abs().max()


def weights_and_biases(dtype):
    weights = [of(dtype, width, 48) / 7 for width in WIDTHS]
    return weights, [of(dtype, width) for width in WIDTHS]


def fwd(x, norm, weights, biases, save=False):
    return native.ops.layer_norm_linear_fwd(
        x, *norm, weights, biases, 1e-6, "layer_norm", [], None, save, False
    )


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_several_weights_are_side_by_side(_threads, dtype, rows, biased):
    x, norm, save = of(dtype, 1, rows, 48), (of(dtype, 48), of(dtype, 48)), biased
    weights, biases = weights_and_biases(dtype)
    out, saved = fwd(x, norm, weights, biases if biased else [], save)
    normalised = F.layer_norm(x.double(), (48,), *wide(*norm), 1e-6)
    products = zip(wide(*weights), wide(*biases) if biased else [None] * 3, strict=True)
    truth = torch.cat([F.linear(normalised, weight, bias) for weight, bias in products], -1)
    assert out.shape == (1, rows, sum(WIDTHS))
    assert len(saved) == 2 * save
    near(out, truth)


@pytest.mark.parametrize("rows", ROWS)
def test_weights_of_any_strides(rows):
    x, norm = of(torch.float32, 1, rows, 48), (None, None)
    weights, biases = weights_and_biases(torch.float32)
    apart = [torch.full((len(w), 50), torch.nan)[:, 1:-1].copy_(w) for w in weights]
    turned = [w.T.contiguous().T for w in weights]
    spread = [torch.full((len(w), 96), torch.nan)[:, ::2].copy_(w) for w in weights]
    truth, _ = fwd(x, norm, weights, biases)
    for others in (apart, turned, spread):
        near(fwd(x, norm, others, biases)[0], truth.double())


def test_as_many_biases_as_weights():
    weights, biases = weights_and_biases(torch.float32)
    for given in ((weights, biases[:2]), ([], [])):
        with pytest.raises(RuntimeError, match="a bias for each or none"):
            fwd(of(torch.float32, 1, 20, 48), (None, None), *given)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_layer_scale_as_a_vector(_threads, dtype, rows):
    x, weight, bias, scale = of(dtype, 1, rows, 48), of(dtype, 33, 48) / 7, of(dtype, 33), of(dtype, 1, 33)[0]
    residual = of(dtype, 2, rows, 33)[:1]
    truth = residual.double() + scale.double() * F.linear(x.double(), weight.double(), bias.double())
    for save in (False, True):
        out, saved = native.ops.linear_residual_fwd(
            x, weight, bias, residual, scale, None, save, False, False
        )
        assert len(saved) == save
        near(out, truth)


def test_layer_scale_of_another_dtype():
    x, weight = of(torch.float32, 1, 40, 48), of(torch.float32, 33, 48)
    residual = of(torch.float32, 1, 40, 33)
    scale = of(torch.bfloat16, 33)
    out, _ = native.ops.linear_residual_fwd(x, weight, None, residual, scale, None, False, False, False)
    near(out, residual.double() + scale.double() * F.linear(x.double(), weight.double()))
