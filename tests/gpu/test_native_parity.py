"""The GEMM halves in the CUDA library are within the contract in every dtype, forward and backward."""

import op_cases
import pytest
import torch
from gpu_calls import COMPILED, LIBRARY, MODES, skip_on_a_cpu
from kernel_checks import products_in
from kernel_launches import on_device
from native_calls import FIXED, OPS, THROUGH, while_training
from op_checks import GRADS, gradients_within_contract, within_contract

from fastvit import extension, use_backend
from fastvit.regimes import pairwise, regimes_of

SIZES = {"batch": 4, "tokens": 197}


pytestmark = LIBRARY


@pytest.fixture(autouse=True)
def _native():
    skip_on_a_cpu(extension.why_no_ops("cpu"))
    with use_backend(COMPILED):
        yield


def judged(op, call, mode, **how):
    if mode in ("float16", "tf32"):
        skip_on_a_cpu(f"{mode} is a GPU's: the C++ library has none")
    call, precision = on_device(call), MODES[mode][1]
    if call.get("sample_scale") is not None:
        call["sample_scale"] = torch.tensor([1.25, 0, 2.5, 1.25]).to(call["sample_scale"])
    with products_in(precision):
        how["tf32"] = precision == "tf32"
        within_contract(op, call, **how)
        within_contract(op, call, while_training(op), **how)
        for grad in GRADS.values():
            through = {"through": THROUGH.get(op, ()), "without": FIXED, "backward": True}
            gradients_within_contract(op, call, grad, **through, **how)


# Every option with every dtype, at a width that has vectors and one that has none.
CELLS = [
    (op, cell)
    for op in OPS
    for cell in pairwise(
        lambda cell: (
            cell.get("norm") != "rms_norm"
            or "weight and bias" not in (cell["affine"], cell.get("inner_norm"))
        ),
        mode=tuple(MODES),
        width=(192, 131),
        **op_cases.OPTIONS[op],
    )
]


@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
def test_every_option(op, cell):
    cell = dict(cell)
    mode = cell.pop("mode")
    hidden = {"hidden": 4 * cell["width"]} if op == "layer_norm_mlp" else {}
    judged(op, op_cases.build(op, dtype=MODES[mode][0], **SIZES, **hidden, **cell), mode)


# The widths of today's models, forward and backward, and one that only the general path takes.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 1280, 1408, 1536, 1664, 2730])
def test_every_width(op, mode, width):
    hidden = {"hidden": 256} if op == "layer_norm_mlp" else {}
    judged(op, op_cases.build(op, dtype=MODES[mode][0], batch=4, tokens=50, width=width, **hidden), mode)


REGIMES = [
    (op, {"mode": mode, "regime": regime})
    for op in OPS
    for mode, (dtype, _) in MODES.items()
    for regime in regimes_of(op, dtype)
]


@pytest.mark.parametrize(("op", "cell"), REGIMES, ids=op_cases.name)
def test_every_regime(op, cell):
    call = op_cases.regime_call(op, cell["regime"], MODES[cell["mode"]][0], tokens=197)
    judged(op, call, cell["mode"], offset_regime=cell["regime"] == "mean_offset")
