"""patch_embed on the Triton kernels is within the contract in every dtype, forward and backward."""

import op_cases
import pytest
import torch
from gpu_calls import MODES, judged_in
from kernel_checks import embed_within_contract
from kernel_launches import GRADS

import fastvit_kernels as kernels
import fastvit_kernels.patch_embed
from fastvit.regimes import pairwise, regimes_of

LAYOUTS = {
    "nchw": torch.Tensor.contiguous,
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "sliced": lambda images: torch.cat([images, images], -1)[..., : images.shape[-1]],
}


def judged(call, grad, layout, precision):
    call["images"] = LAYOUTS[layout](call["images"])
    for given in (None, grad):
        embed_within_contract(kernels, call, given, precision=precision)


# Pairwise over all that a call can vary in. Dropped: colours as sequences, which the op makes tensors of, and
# positions of patches alone where there is no prefix.
CELLS = pairwise(
    lambda cell: cell["prefix"] or cell["positions"] != "patches",
    mode=tuple(MODES),
    patch=((14, 14), (16, 16), (32, 32), (2, 3)),
    channels=(3, 1, 5),
    images=("float", "uint8"),
    layout=tuple(LAYOUTS),
    normalized=(None, "tensors", "mean", "std"),
    bias=(True, False),
    positions=("all", "patches", None),
    prefix=(1, 0, 5),
    grad=tuple(GRADS),
)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option(cell):
    cell = dict(cell)
    mode, grad, layout = (cell.pop(name) for name in ("mode", "grad", "layout"))
    with judged_in(mode) as (dtype, precision):
        call = op_cases.build("patch_embed", dtype=dtype, batch=3, grid=(3, 5), width=72, **cell)
        judged(call, grad, layout, precision)


REGIMES = [
    {"mode": mode, "regime": regime}
    for mode, (dtype, _) in MODES.items()
    for regime in regimes_of("patch_embed", dtype)
]


@pytest.mark.parametrize("cell", REGIMES, ids=op_cases.name)
def test_every_regime(cell):
    with judged_in(cell["mode"]) as (dtype, precision):
        sizes = {"batch": 2, "tokens": 197, "width": 192, "patch": 16}
        call = op_cases.regime_call("patch_embed", cell["regime"], dtype, **sizes)
        judged(call, "contiguous", "nchw", precision)
