"""On Hopper, fc1 with the activation in its epilogue is within the contract, and is what runs.

So is a product with the norm before it folded in.
"""

from functools import partial

import op_cases
import pytest
import torch
from gpu_calls import HOPPER, MODES, given_tensors, same
from kernel_launches import on_device
from native_calls import FIXED, THROUGH, while_training
from op_checks import GRADS, gradients_within_contract, within_contract

from fastvit import ops, use_backend
from fastvit.ops import choices
from fastvit.regimes import pairwise, regimes_of

OP, LINEAR = "layer_norm_mlp", "layer_norm_linear"
HALF = ("float16", "bfloat16")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
pytestmark = HOPPER
of_the_profiler = pytest.mark.needs(runtime=True)  # which says what ran


@pytest.fixture(autouse=True)
def _fused(gpu):
    with use_backend("cuda"), choices.fusing(True), choices.folding(False):
        yield


def build(mode, op=OP, **options):
    call = on_device(op_cases.build(op, dtype=MODES[mode][0], **options))
    if call.get("sample_scale") is not None:
        call["sample_scale"] = torch.linspace(0.5, 2, len(call["x"])).to(call["sample_scale"])
    return call


def judged(call, **how):
    within_contract(OP, call, **how)
    within_contract(OP, call, while_training(OP), **how)
    for grad in GRADS.values():
        gradients_within_contract(OP, call, grad, through=THROUGH[OP], without=FIXED, backward=True, **how)


# One row, a part of a tile, exactly one, and a part of a second; of each tile's shape and of the split sums.
CELLS = pairwise(
    lambda cell: True,
    mode=HALF,
    activation=ACTIVATIONS,
    tokens=(1, 2, 17, 128, 197, 257),
    batch=(1, 3),
    width=(64, 192, 328),
    hidden=(8, 128, 768, 1000),
    layer_scale=(True, False),
)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option(cell):
    cell = dict(cell)
    judged(build(cell.pop("mode"), **cell))


# The products of ViT-S, -B and -L; more rows than these would take a float64 oracle's memory.
@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("width", [384, 768, 1024])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_shapes_of_models(mode, width, batch):
    judged(build(mode, batch=batch, tokens=197, width=width, hidden=4 * width))


REGIMES = [(mode, regime) for mode in HALF for regime in regimes_of(OP, MODES[mode][0])]


@pytest.mark.parametrize(("mode", "regime"), REGIMES)
def test_every_regime(mode, regime):
    call = on_device(op_cases.regime_call(OP, regime, MODES[mode][0], tokens=197))
    judged(call, offset_regime=regime == "mean_offset")


def run(call):
    """The output without and with what is saved, and every gradient."""
    leaves = {name: t.detach().requires_grad_(name not in FIXED) for name, t in given_tensors(call).items()}
    with torch.no_grad():
        inferred = ops.layer_norm_mlp(**call)
    out = ops.layer_norm_mlp(**call | leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out))
    return {"inferred": inferred, "out": out.detach()} | dict(zip(wanted, gradients, strict=True))


# Of one wave, of sums that are split, and of many waves.
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_same_bits_on_every_run_and_with_what_is_saved(batch):
    call = build(
        "bfloat16", batch=batch, tokens=197, width=768, hidden=3072, layer_scale=False, sample_scale=False
    )
    first = run(call)
    assert torch.equal(first["inferred"], first["out"])
    for _ in range(100):
        same(run(call), first)


def kernels_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@of_the_profiler
def test_it_is_what_runs():
    call = build("bfloat16", batch=2, tokens=197, width=384, hidden=1536)
    names = kernels_of(lambda: run(call))
    assert len([name for name in names if "fastvit::sm90" in name]) == 2  # forward and backward
    assert not any("activate_" in name for name in names)
    with choices.fusing(False):
        assert any("activate_" in name for name in kernels_of(lambda: run(call)))


# A width that TMA cannot address takes the portable products, and says nothing.
@of_the_profiler
def test_other_widths_are_served_as_before():
    judged(build("bfloat16", batch=2, tokens=50, width=131, hidden=131))
    folds(build("bfloat16", batch=2, tokens=50, width=131, hidden=131), served=False)


def folds(call, op=OP, served=True, **how):
    """The op with its norm folded is within the contract, and runs one product and the norm's statistics."""
    with choices.folding(True):
        within_contract(op, call, partial(getattr(ops, op), frozen=True), **how)
        with torch.no_grad():
            names = kernels_of(lambda: getattr(ops, op)(**call, frozen=True))
    assert served == any("Finish" in name for name in names), names
    assert not served or not any("activate_" in name for name in names)


# All that the folded form sees of a call; a gate has the norm in a pass of its own.
FOLDED_CELLS = pairwise(
    lambda cell: cell["norm"] == "layer_norm" or cell["affine"] != "weight and bias",
    mode=HALF,
    activation=(*ACTIVATIONS, "swiglu"),
    norm=("layer_norm", "rms_norm"),
    affine=("weight and bias", "weight", None),
    biases=(True, False),
    tokens=(1, 2, 17, 128, 197, 257),
    batch=(1, 3),
    width=(64, 192, 328),
    hidden=(8, 128, 768, 1000),
)


@of_the_profiler
@pytest.mark.parametrize("cell", FOLDED_CELLS, ids=op_cases.name)
def test_every_option_with_the_norm_folded(cell):
    cell = dict(cell)
    folds(build(cell.pop("mode"), **cell), served=cell["activation"] != "swiglu")


@of_the_profiler
@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("width", [384, 768, 1024])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_shapes_of_models_with_the_norm_folded(mode, width, batch):
    size = {"batch": batch, "tokens": 197, "width": width}
    folds(build(mode, **size, hidden=4 * width))
    folds(build(mode, LINEAR, **size, out=3 * width), LINEAR)


@of_the_profiler
@pytest.mark.parametrize("op", [OP, LINEAR])
@pytest.mark.parametrize(("mode", "regime"), REGIMES)
def test_every_regime_with_the_norm_folded(op, mode, regime):
    call = on_device(op_cases.regime_call(op, regime, MODES[mode][0], tokens=197))
    folds(call, op, offset_regime=regime == "mean_offset")


# The regimes' mean is thirty deviations; how a tensor core rounds its sums decides what of a hundred is left.
@of_the_profiler
@pytest.mark.parametrize("mode", HALF)
def test_a_mean_of_a_hundred_deviations_with_the_norm_folded(mode):
    call = build(mode, LINEAR, batch=2, tokens=197, width=768, out=2304)
    folds(call | {"x": call["x"] + 100}, LINEAR)


@of_the_profiler
def test_an_edit_is_seen_with_the_norm_folded():
    call = build("bfloat16", batch=2, tokens=197, width=384, hidden=1536)
    for name in ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias"):
        folds(call)
        call[name][0] += 1
    folds(call)


@pytest.mark.needs(runtime=True)
def test_in_a_graph():
    call = build("bfloat16", batch=8, tokens=197, width=768, hidden=3072)
    with torch.no_grad():
        expected = ops.layer_norm_mlp(**call)
        graph, out = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            out = ops.layer_norm_mlp(**call)
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)
