"""The moments that linear_residual and layer_norm_mlp leave are their output's, and serve the next norm.

On Hopper they come from the product's epilogue, elsewhere and in float32 from a pass of their own.
"""

from functools import partial

import gpu_calls
import op_cases
import pytest
import torch
from gpu_calls import HOPPER, LIBRARY, MODES, same
from kernel_launches import on_device
from op_checks import within_contract

from fastvit import ops, use_backend
from fastvit.contract import judge_saved
from fastvit.ops import choices, native
from fastvit.regimes import pairwise, regimes_of

RESIDUAL, MLP, LINEAR = "linear_residual", "layer_norm_mlp", "layer_norm_linear"
HALF = ("float16", "bfloat16")
pytestmark = LIBRARY


@pytest.fixture(autouse=True)
def _giving(gpu):
    with use_backend(gpu_calls.COMPILED), choices.giving_moments(True), choices.folding(False):
        yield


def build(mode, op=RESIDUAL, **options):
    return on_device(op_cases.build(op, dtype=MODES[mode][0], **options))


def giving(op, **how):
    """The op as one that returns its output alone; its moments are held to what the output is."""

    def call(*args, **options):
        with torch.no_grad():
            out, moments = getattr(ops, op)(*args, **options, **how, with_moments=True)
        _are_of(moments, out)
        return out

    return call


def _are_of(moments, out):
    """By the contract's bound for what a norm saves; a mean near zero is measured by what cancelled."""
    for part, of in enumerate(out.double().flatten(0, 1).split(native.MOMENT_COLUMNS, 1)):
        mean = of.mean(1)
        deviation = (of - mean[:, None]).square().mean(1).sqrt()
        found = moments[part, :, 0], (moments[part, :, 1] / of.shape[1]).sqrt()
        size = of.abs().mean(1)
        for check in (
            judge_saved("mean", found[0], mean, scale=size),
            judge_saved("deviation", found[1], deviation, scale=1e-2 * size),
        ):
            assert check.ok, check


def taking(op, moments):
    """The op with the norm's statistics from moments, folded into the product where there is a kernel."""

    def call(*args, **options):
        with torch.no_grad(), choices.folding(True):
            return getattr(ops, op)(*args, **options, moments=moments, frozen=True)

    return call


def judged(call, op=RESIDUAL, **how):
    within_contract(op, call, giving(op), **how)
    within_contract(op, call, giving(op, frozen=True), **how)


def chained(call, norm="layer_norm", op=RESIDUAL):
    """What the next norm makes of the moments is within the contract, of QKV and of an MLP."""
    with torch.no_grad():
        out, moments = getattr(ops, op)(**call, with_moments=True)
    dtype = str(out.dtype).removeprefix("torch.")
    sizes = dict(zip(("batch", "tokens", "width"), out.shape, strict=True))
    for taker in (LINEAR, MLP):
        then = build(dtype, taker, **sizes, norm=norm, affine="weight") | {"x": out}
        within_contract(taker, then, taking(taker, moments))


# One row, a part of a tile, exactly one, and a part of a second; and columns that end within a part of 64.
CELLS = pairwise(
    lambda cell: True,
    mode=(*HALF, "float32"),
    tokens=(1, 2, 17, 128, 197, 257),
    batch=(1, 3),
    width=(64, 192, 200, 328),
    inner=(8, 128, 768, 1000),
    layer_scale=(True, False),
    sample_scale=(True, False),
    bias=(True, False),
)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option(cell):
    cell = dict(cell)
    judged(build(cell.pop("mode"), **cell))


# Projection and fc2 of ViT-S, -B and -L.
@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("width", [384, 768, 1024])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_shapes_of_models(mode, width, batch):
    for inner in (width, 4 * width):
        judged(build(mode, batch=batch, tokens=197, width=width, inner=inner, sample_scale=False))


REGIMES = [
    (op, mode, regime) for op in (RESIDUAL, MLP) for mode in HALF for regime in regimes_of(op, MODES[mode][0])
]


@pytest.mark.parametrize(("op", "mode", "regime"), REGIMES)
def test_every_regime(op, mode, regime):
    call = on_device(op_cases.regime_call(op, regime, MODES[mode][0], tokens=197))
    judged(call, op, offset_regime=regime == "mean_offset")


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("width", [192, 200, 768])
def test_the_next_norm(mode, norm, offset, width):
    call = build(mode, batch=2, tokens=197, width=width, inner=width, sample_scale=False)
    chained(call | {"residual": call["residual"] + offset}, norm)


# Of one wave, of sums that are split, and of many waves.
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_same_bits_on_every_run(batch):
    call = build("bfloat16", batch=batch, tokens=197, width=768, inner=768, sample_scale=False)
    with torch.no_grad():
        first = dict(zip(("out", "moments"), ops.linear_residual(**call, with_moments=True), strict=True))
        for _ in range(100):
            again = ops.linear_residual(**call, with_moments=True)
            same(dict(zip(first, again, strict=True)), first)


def kernels_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@HOPPER
@pytest.mark.needs(runtime=True)
@pytest.mark.parametrize(("mode", "width", "one"), [("bfloat16", 384, True), ("bfloat16", 131, False)])
def test_it_is_what_runs(mode, width, one):
    """One product, and no pass for the next norm's statistics; what TMA cannot address is served too."""
    call = build(mode, batch=2, tokens=197, width=width, inner=width, sample_scale=False)
    then = build(mode, LINEAR, batch=2, tokens=197, width=width)

    def both():
        with torch.no_grad():
            out, moments = ops.linear_residual(**call, with_moments=True)
            taking(LINEAR, moments)(**then | {"x": out})

    both()
    names = kernels_of(both)
    assert one == any("AddResidual" in name for name in names), names
    assert one != any("row_moments_kernel" in name for name in names), names
    assert any("statistics_kernel" in name for name in names), names
    assert not any("norm_forward_kernel" in name for name in names), names


@pytest.mark.needs(runtime=True)
def test_in_a_graph():
    call = build("bfloat16", batch=8, tokens=197, width=768, inner=3072, sample_scale=False)
    run = partial(ops.linear_residual, **call, with_moments=True)
    with torch.no_grad():
        expected = run()
        graph, found = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            found = run()
        for one in found:
            one.zero_()
        graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
