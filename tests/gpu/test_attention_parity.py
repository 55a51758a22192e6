"""attention on the Triton kernels is within the contract in every dtype, forward and backward."""

from itertools import cycle

import op_cases
import pytest
from gpu_calls import MODES, judged_in
from kernel_checks import attention_within_contract
from kernel_launches import GRADS
from served import KERNELS, served

from fastvit.regimes import REGIMES, pairwise, regimes_of
from fastvit_kernels import attention, tiles


def judged(mode, grad, call):
    with judged_in(mode) as (_, precision):
        for given in dict.fromkeys((None, grad)):
            attention_within_contract(KERNELS, call, given, precision=precision)


def of_regime(cell):
    sizes = {name: cell[name] for name in ("tokens", "head_dim")}
    return op_cases.regime_call("attention", cell["regime"], MODES[cell["mode"]][0], batch=2, **sizes)


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
CELLS = served("attention", CELLS, of_regime)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_regime(cell):
    judged(cell["mode"], cell["grad"], of_regime(cell))


def with_options(cell):
    options = {name: value for name, value in cell.items() if name not in ("mode", "grad")}
    return op_cases.build("attention", dtype=MODES[cell["mode"]][0], tokens=83, head_dim=64, **options)


# Every option pairwise, with dtypes and kinds of gradient; a causal mask the kernels lack.
OPTIONS = served("attention", op_cases.cells("attention", mode=tuple(MODES), grad=tuple(GRADS)), with_options)


@pytest.mark.parametrize("cell", OPTIONS, ids=op_cases.name)
def test_every_option(cell):
    judged(cell["mode"], cell["grad"], with_options(cell))


# The longest of a ViT's: many blocks of keys. Dropped: other dtypes, for the time of their oracle.
@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
def test_many_tokens(mode, gpu):
    call = op_cases.build("attention", dtype=MODES[mode][0], tokens=1370, head_dim=64)
    judged(mode, "contiguous", call)


# The backward in one launch with every number of blocks, and in two where the table would take one.
@pytest.mark.parametrize(
    ("one", "tokens"),
    [*((1, tokens) for tokens in range(13, 273, 16)), (1, 257), (0, 50), (0, 197), (0, 257)],
)
def test_both_forms_of_the_backward(one, tokens, gpu):
    kernel, arch = "attention_bwd_heads", attention.arch_of(gpu)
    index = tiles.place(kernel, arch, "half", head_dim=64, tokens=tokens, load=0)
    call = op_cases.build("attention", dtype=MODES["bfloat16"][0], tokens=tokens, head_dim=64)
    with tiles.overriding(kernel, arch, index, tiles.table(arch)[kernel][index] | {"ONE_LAUNCH": one}):
        judged("bfloat16", "contiguous", call)
