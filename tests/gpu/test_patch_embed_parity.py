"""patch_embed on the Triton kernels is within the contract in every dtype, forward and backward."""

import op_cases
import pytest
import torch
from gpu_calls import MODES, judged_in
from kernel_checks import embed_within_contract
from kernel_launches import GRADS
from served import KERNELS, served

from fastvit.regimes import pairwise, regimes_of

LAYOUTS = {
    "nchw": torch.Tensor.contiguous,
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "sliced": lambda images: torch.cat([images, images], -1)[..., : images.shape[-1]],
}


def judged(mode, grad, call):
    with judged_in(mode) as (_, precision):
        for given in dict.fromkeys((None, grad)):
            embed_within_contract(KERNELS, call, given, precision=precision)


def with_options(cell):
    options = {name: value for name, value in cell.items() if name not in ("mode", "grad", "layout")}
    sizes = {"batch": 3, "grid": (3, 5), "width": 72}
    call = op_cases.build("patch_embed", dtype=MODES[cell["mode"]][0], **sizes, **options)
    return call | {"images": LAYOUTS[cell["layout"]](call["images"])}


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
CELLS = served("patch_embed", CELLS, with_options)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option(cell):
    judged(cell["mode"], cell["grad"], with_options(cell))


def of_regime(cell):
    sizes = {"batch": 2, "tokens": 197, "width": 192, "patch": 16}
    return op_cases.regime_call("patch_embed", cell["regime"], MODES[cell["mode"]][0], **sizes)


REGIMES = [
    {"mode": mode, "regime": regime, "grad": "contiguous"}
    for mode, (dtype, _) in MODES.items()
    for regime in regimes_of("patch_embed", dtype)
]
REGIMES = served("patch_embed", REGIMES, of_regime)


@pytest.mark.parametrize("cell", REGIMES, ids=op_cases.name)
def test_every_regime(cell):
    judged(cell["mode"], cell["grad"], of_regime(cell))
