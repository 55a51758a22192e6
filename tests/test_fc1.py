"""fc1 with the activation in its epilogue, as far as it needs no GPU: maths, tiles, and when it is used."""

import ctypes

import plain_ops
import pytest
import torch
import torch.nn.functional as F
from fc1_library import call, compiled, compiled_with, needs_compiler
from native_mutants import FC1_MUTANTS
from torch._subclasses import FakeTensorMode

from fastvit import measurements, native_backend
from fastvit.contract import judge
from fastvit.ops import choices

HALF = (torch.float16, torch.bfloat16)
# In the order of the C++ enumeration.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


@pytest.fixture(scope="module")
def fc1(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("fc1"))


def activated(fc1, x, activation):
    y = torch.empty_like(x)
    call(fc1.activated, x, y, x.numel(), ctypes.c_int(ACTIVATIONS.index(activation)))
    return y


def differentiated(fc1, grad, x, activation):
    """The gradient through the activation, and the activation once more."""
    results = torch.empty_like(x), torch.empty_like(x)
    call(fc1.differentiated, grad, x, *results, x.numel(), ctypes.c_int(ACTIVATIONS.index(activation)))
    return results


# Rows, inputs and outputs of fc1: enough for every sum to have its usual error.
T, D, M = 96, 128, 256
# The amplitude of what enters the product, or an offset of all of it.
REGIMES = {"randn": (1.0, 0.0), "amplitude 4": (4.0, 0.0), "small": (3e-3, 0.0), "negative": (1.0, -2.0)}


def operands(dtype, regime):
    generator = torch.Generator().manual_seed(0)
    amplitude, offset = REGIMES[regime]
    of = [torch.randn(size, generator=generator) for size in ((T, D), (M, D), (M,), (T, D), (D, M))]
    x, weight, bias, grad, fc2 = (
        of[0] * amplitude,
        of[1] * D**-0.5,
        0.1 * of[2] + offset,
        of[3],
        of[4] * D**-0.5,
    )
    return [t.to(dtype) for t in (x, weight, bias, grad, fc2)]


def in_torch(x, weight, bias, grad, fc2, activation):
    """fc1, and what is before it of fc2's gradient, in torch's own ops and the dtype that is given."""
    before = F.linear(x, weight, bias).detach().requires_grad_()
    out = plain_ops.ACTIVATIONS[activation](before)
    (dbefore,) = torch.autograd.grad(out, before, grad @ fc2)
    return {"out": out.detach(), "dbefore": dbefore, "dbias": dbefore.sum(0)}


def in_epilogues(fc1, x, weight, bias, grad, fc2, activation):
    """The same as the kernels have it: sums in float32, and rounded where they are written."""
    dtype = x.dtype
    before = (x.float() @ weight.float().T + bias.float()).to(dtype).float()
    dbefore, again = differentiated(fc1, grad.float() @ fc2.float(), before, activation)
    out = activated(fc1, before, activation)
    assert torch.equal(out.to(dtype), again.to(dtype))
    return {"out": out.to(dtype), "dbefore": dbefore.to(dtype), "dbias": dbefore.sum(0).to(dtype)}


def within_contract(fc1, dtype, activation, regime):
    given = operands(dtype, regime)
    truth = in_torch(*(t.double() for t in given), activation)
    baseline = in_torch(*given, activation)
    for name, result in in_epilogues(fc1, *given, activation).items():
        check = judge(name, result, truth[name], baseline[name], kind="gemm")
        assert check.ok, check


@needs_compiler
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("regime", REGIMES)
def test_forward_and_backward_are_within_the_contract(fc1, dtype, activation, regime):
    within_contract(fc1, dtype, activation, regime)


def exact_gelu(fc1):
    """To the polynomial's own error: half precision would hide tanh's."""
    x = torch.linspace(-14, 14, 16 * 4096)
    exact = x.double().requires_grad_()
    truth = F.gelu(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    found, again = differentiated(fc1, torch.ones_like(x), x, "gelu")
    assert (activated(fc1, x, "gelu") - truth).abs().max() <= 4e-6
    assert (again - truth).abs().max() <= 4e-6
    assert (found - slope).abs().max() <= 2e-5


@needs_compiler
def test_gelu_is_erfs(fc1):
    exact_gelu(fc1)


def sums_of_columns(fc1):
    """Eight lanes add up eight columns, and each is left with its own."""
    numbers = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    sums = torch.empty(8)
    call(fc1.sums_over_lanes, numbers, sums)
    assert (sums - numbers.double().sum(0)).abs().max() <= 8 * 2**-24 * numbers.abs().sum(0).max()


@needs_compiler
def test_lanes_add_up_their_columns(fc1):
    sums_of_columns(fc1)


# Where a warp group's product lies: of 32 columns the first four lanes hold eight each, and together all.
@needs_compiler
def test_every_column_is_summed_by_one_lane(fc1):
    assert [fc1.place(fc1.column(place)) for place in range(8)] == list(range(8))
    held = [fc1.column(place) + 2 * lane for lane in range(4) for place in range(8)]
    assert sorted(held) == list(range(32))


CHECKS = {
    "contract": lambda fc1: within_contract(fc1, torch.float16, "gelu", "randn"),
    "quick_gelu": lambda fc1: within_contract(fc1, torch.float16, "quick_gelu", "randn"),
    "gelu": exact_gelu,
    "sums": sums_of_columns,
}


@needs_compiler
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in FC1_MUTANTS if mutant.check in CHECKS],
    ids=lambda mutant: f"{mutant.file}: {mutant.fault}",
)
def test_red_with_a_fault(mutant, tmp_path):
    faulty = compiled_with(mutant, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](faulty)


MEASURED = {"op": "layer_norm_mlp", "gpu": "NVIDIA H100", "dtype": "bfloat16", "options": "fused", "ok": True}
FUSED = {"width": 768, "hidden": 3072, "rows": [1, 1576], "ratio": 1.1, "direction": "fwd"}


@pytest.fixture
def gpu(monkeypatch):
    """Tokens and weights on a GPU that is not there, and a function that sets what was measured on it."""
    monkeypatch.setattr(native_backend, "machine_name", lambda device: MEASURED["gpu"])

    def measured(*rows):
        parsed = [measurements._parsed(MEASURED | FUSED | row) for row in rows]
        monkeypatch.setattr(measurements, "_tables", {key: (row,) for key, row in parsed})

    measured()
    with FakeTensorMode():
        x = torch.empty(8, 197, 768, dtype=torch.bfloat16, device="cuda")
        yield x, torch.empty(3072, 768, dtype=torch.bfloat16, device="cuda"), measured


def test_it_is_used_only_where_it_was_measured_right_and_no_slower(gpu):
    x, weight, measured = gpu

    def fuses(direction, x=x, dtype=torch.bfloat16):
        return choices.fuses(x, weight, dtype, direction)

    assert not fuses("fwd")
    measured({})
    assert fuses("fwd")
    assert not fuses("bwd")
    assert not fuses("fwd", dtype=torch.float16)
    assert not fuses("fwd", torch.empty(9, 197, 768, dtype=torch.bfloat16, device="cuda"))
    for row in ({"ratio": 0.9}, {"ok": False}, {"hidden": 1536}, {"gpu": "another"}):
        measured(row)
        assert not fuses("fwd")


def test_a_benchmark_decides_for_itself(gpu):
    x, weight, measured = gpu
    with choices.fusing(True):
        assert choices.fuses(x, weight, torch.bfloat16, "bwd")
        with choices.fusing(False):
            assert not choices.fuses(x, weight, torch.bfloat16, "bwd")
        assert not choices.fuses(torch.empty(1, 2, 768), torch.empty(8, 768), torch.float32, "fwd")
    measured({})
    with choices.fusing(False):
        assert not choices.fuses(x, weight, torch.bfloat16, "fwd")
