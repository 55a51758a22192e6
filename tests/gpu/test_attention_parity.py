"""attention on the Triton kernels is within the contract in every dtype, forward and backward."""

from functools import partial
from itertools import cycle

import op_cases
import pytest
from gpu_calls import MODES, judged_in
from kernel_checks import attention_within_contract
from kernel_launches import GRADS

import fastvit_kernels as kernels
import fastvit_kernels.attention
from fastvit.regimes import REGIMES, pairwise, regimes_of


def judged(mode, grad, build, **cell):
    with judged_in(mode) as (dtype, precision):
        call = build(dtype=dtype, **cell)
        for given in (None, grad):
            attention_within_contract(kernels, call, given, precision=precision)


# Pairwise over data, dtypes, tokens and head dims. Dropped, because each cell compiles kernels of its own:
# 2 and 196 tokens and heads of 48 and 88 channels, which tests/test_attention_kernels.py has.
CELLS = pairwise(
    lambda cell: cell["regime"] in regimes_of("attention", MODES[cell["mode"]][0]),
    regime=[name for name, regime in REGIMES.items() if "attention" in regime.ops],
    mode=tuple(MODES),
    tokens=(1, 17, 50, 197, 257, 577),
    head_dim=(32, 64, 72, 80, 96, 128),
)
CELLS = [cell | {"grad": grad} for cell, grad in zip(CELLS, cycle(GRADS), strict=False)]


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_regime(cell):
    judged(build=partial(op_cases.regime_call, "attention", batch=2), **cell)


# Every option pairwise, with dtypes and kinds of gradient. Dropped: a causal mask, which the kernels lack.
OPTIONS = [
    cell
    for cell in op_cases.cells("attention", mode=tuple(MODES), grad=tuple(GRADS))
    if cell["mask"] != "causal"
]


@pytest.mark.parametrize("cell", OPTIONS, ids=op_cases.name)
def test_every_option(cell):
    judged(build=partial(op_cases.build, "attention", tokens=83, head_dim=64), **cell)


# The longest of a ViT's: many blocks of keys. Dropped: other dtypes, for the time of their oracle.
@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
def test_many_tokens(mode, gpu):
    judged(mode, "contiguous", partial(op_cases.build, "attention", tokens=1370, head_dim=64))
