"""attention on the Triton kernels: output, log-sum-exp and gradients by the contract."""

from itertools import cycle

import op_cases
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import attention_within_contract
from kernel_launches import (
    DEVICE,
    DTYPES,
    FORMS,
    GPU,
    GRADS,
    PRECISIONS,
    attention_form,
    attention_launch,
    on_device,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit_kernels as kernels
import fastvit_kernels.attention
from fastvit.regimes import HEAD_DIMS, TOKENS, pairwise

HEAVY = 257  # tokens from which on a call in the interpreter takes seconds


def _runs(cell):
    """In this place: bfloat16 and tf32 are a GPU's, and 577 tokens are too many to be resident."""
    tf32 = cell["precision"] == "tf32"
    resident = cell["form"] == "resident" and cell["tokens"] > 384
    return cell["dtype"] in DTYPES and (cell["dtype"] == torch.float32 or not tf32) and not resident


def _runs_soon(cell):
    return _runs(cell) and (GPU or cell["tokens"] < HEAVY or cell["head_dim"] <= 64)


def _differentiates_soon(cell):
    return _runs_soon(cell) and (GPU or cell["tokens"] < HEAVY or cell["regime"] in ("randn", "masked"))


# Pairwise over data, dtypes, tokens, head dims and the kernel's two forms. Dropped: the full product; in the
# interpreter, for time alone, heads of more than 64 channels with 257 tokens or more.
FORWARD = op_cases.regime_cells(
    "attention",
    _runs_soon,
    tokens=TOKENS,
    head_dim=HEAD_DIMS,
    form=(None, *FORMS),
    precision=PRECISIONS,
)
# Dropped beside those: 196 tokens, and in the interpreter most regimes of 257 tokens or more.
BACKWARD = op_cases.regime_cells(
    "attention",
    _differentiates_soon,
    tokens=tuple(tokens for tokens in TOKENS if tokens != 196),
    head_dim=HEAD_DIMS,
    form=(None, "online"),
    precision=PRECISIONS,
    grad=tuple(GRADS),
)


def judged(cell, build, grad=None):
    cell = dict(cell)
    form, precision, grad = cell.pop("form"), cell.pop("precision", "ieee"), cell.pop("grad", grad)
    with attention_form(kernels, form):
        attention_within_contract(kernels, build(**cell), grad, precision=precision)


def _regime(**cell):
    return op_cases.regime_call("attention", batch=1, heads=1, **cell)


@pytest.mark.parametrize("cell", FORWARD, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    judged(cell, _regime)


@pytest.mark.parametrize("cell", BACKWARD, ids=op_cases.name)
def test_every_regimes_gradients_are_within_the_contract(cell):
    judged(cell, _regime)


# Every option pairwise, with each kind of gradient and none. Sizes (heads that are no power of two, odd ones
# where nothing rotates, several tiles and a ragged one) and forms go round. Dropped: a causal mask and
# dropout, which the kernels do not have, and the full product.
OPTIONS = pairwise(
    lambda cell: op_cases._says_something("attention", cell),
    **op_cases.OPTIONS["attention"] | {"mask": (None, "bool", "float")},
    dtype=DTYPES,
    grad=(None, *GRADS),
)
SIZES = [{"tokens": n, "head_dim": d} for n, d in ((7, 8), (50, 72), (33, 48), (35, 22), (17, 96))]
CELLS = [
    cell | size | {"form": form} for cell, size, form in zip(OPTIONS, cycle(SIZES), cycle((None, *FORMS)))
]


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    judged(cell, lambda **options: op_cases.build("attention", batch=1, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_second_run_gives_the_same_bits(dtype, form):
    options = {"norm": "layer_norm", "rope": "half", "key_mask": True, "mask": "float"}
    call = on_device(op_cases.build("attention", dtype=dtype, batch=1, tokens=33, **options))
    with attention_form(kernels, form):
        first, second = (attention_launch(kernels, call, "contiguous") for _ in range(2))
    assert len(first) == 9
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["bool", "float", "keys", "keys and bool"])
def test_wholly_masked_rows_are_zero_with_finite_gradients(dtype, form, mask):
    tokens, dead = 19, 17
    call = op_cases.build("attention", dtype=dtype, tokens=tokens)
    attended = torch.ones(tokens, tokens, dtype=torch.bool)
    attended[dead] = False
    additive = torch.zeros(tokens, tokens, dtype=dtype).masked_fill(~attended, -torch.inf)
    some, rows = torch.ones(2, tokens, dtype=torch.bool), (slice(None), dead)
    if mask == "keys":
        some[1], rows = False, (1,)
    if mask == "keys and bool":  # one mask takes the first key, and the other leaves nothing else
        some[:, 0], attended[dead, 0] = False, True
    call["attn_mask"] = {"float": additive, "keys": None}.get(mask, attended)
    call["key_mask"] = some if "keys" in mask else None
    with attention_form(kernels, form):
        found = attention_launch(kernels, on_device(call), "sum")
    assert found["out"][rows].count_nonzero() == 0
    assert found["q"][rows].count_nonzero() == 0
    assert found["lse"].transpose(1, 2)[rows].isneginf().all()
    assert all(found[name].isfinite().all() for name in "qkv")
    alive = torch.ones(2, tokens, dtype=torch.bool, device=DEVICE)
    alive[rows] = False
    assert (found["out"][alive] != 0).all()


# Of the calls' own dtype, and bfloat16's that was cast. Dropped: float16's in float32, which is not large:
# a row of nothing else keeps three digits of its weights there, as in torch's fused op.
@pytest.mark.parametrize(
    ("dtype", "of"), [*[(dtype, dtype) for dtype in DTYPES], (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [None, "contiguous"])
def test_a_mask_of_the_least_float_is_finite(dtype, of, form, grad):
    """As transformers masks: a row of nothing else weighs its keys alike, and -inf beside it is -inf still.

    torch's fused backward weighs each of them 1, in float64 too, since its log-sum-exp has no room for log N.
    """
    tokens, least = 19, torch.finfo(of).min
    call = op_cases.build("attention", dtype=dtype, tokens=tokens)
    mask = torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(2)).to(dtype)
    mask[:, 11:] = least
    mask[3] = mask[17] = least
    mask[5, 2:] = least
    mask[7], mask[7, ::3] = -torch.inf, least
    mask[9], mask[9, 4] = -torch.inf, 0.0
    with attention_form(kernels, form), sdpa_kernel(SDPBackend.MATH):
        attention_within_contract(kernels, call | {"attn_mask": mask}, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("part", range(3), ids="qkv".__getitem__)
def test_is_finite_where_torchs_own_is(dtype, form, value, part):
    ours, untouched, theirs = _with_one_value(dtype, form, value, part, None)
    assert torch.equal(ours["out"].isfinite(), theirs.isfinite())
    # One head of one image, and of a query one row: nothing else may notice.
    reached = torch.zeros_like(theirs, dtype=torch.bool)
    reached[0, 17 if part == 0 else slice(None), :4] = True
    torch.testing.assert_close(ours["out"][~reached], untouched["out"][~reached])


# Dropped: inf and half precision, whose gradients no other head's numbers meet either.
@pytest.mark.parametrize("part", range(3), ids="qkv".__getitem__)
def test_no_other_heads_gradient_notices_a_nan(part):
    ours, untouched, _ = _with_one_value(torch.float32, "online", torch.nan, part, "contiguous")
    for name in "qkv":
        # dv is the weights' product with the output's gradient: a value cannot reach it.
        assert bool(ours[name][0, :, 0].isfinite().all()) == (part == 2 and name == "v")
        beside = torch.ones_like(ours[name], dtype=torch.bool)
        beside[0, :, 0] = False
        assert torch.equal(ours[name][beside], untouched[name][beside])


def _with_one_value(dtype, form, value, part, grad):
    """Ours with this value in the last token, ours without, and torch's own output."""
    qkv = torch.randn(2, 18, 3, 2, 4).to(DEVICE, dtype)
    altered = qkv.clone()
    altered[0, 17, part, 0, 2] = value
    with attention_form(kernels, form):
        ours, untouched = (
            attention_launch(kernels, {"qkv": given.flatten(2), "num_heads": 2}, grad)
            for given in (altered, qkv)
        )
    q, k, v = altered.permute(2, 0, 3, 1, 4)
    return ours, untouched, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("grad", [None, "contiguous"])
def test_an_empty_batch(grad):
    call = op_cases.build("attention", dtype=torch.float32, batch=0, norm="layer_norm")
    found = attention_launch(kernels, on_device(call), grad)
    assert found["out"].shape == (0, 7, 16)
    assert found["lse"].shape == (0, 2, 7)
    if grad:
        assert found["q"].shape == (0, 7, 2, 8)
        assert found["k_norm_weight"].count_nonzero() == 0


def test_the_log_sum_exp_is_left_out_where_nothing_needs_it():
    q, k, v = torch.randn(3, 2, 17, 2, 32, device=DEVICE)
    out, none = kernels.attention.attention_fwd(q, k, v, scale=0.2)
    assert none.shape == (0,)
    assert torch.equal(out, kernels.attention.attention_fwd(q, k, v, scale=0.2, with_lse=True)[0])


def test_refuses_what_it_cannot_read():
    wide, odd = torch.empty(1, 2, 1, 257, device=DEVICE), torch.empty(1, 2, 8, 2, device=DEVICE).mT
    with pytest.raises(ValueError, match="up to 256 channels a head, not 257"):
        kernels.attention.attention_fwd(wide, wide, wide, scale=1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.attention.attention_fwd(odd, odd, odd, scale=1.0)
