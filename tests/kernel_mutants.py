"""Faults put into the Triton kernels one at a time, and the check that each fails."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import op_cases
import torch
from kernel_checks import attention_within_contract, embed_within_contract
from kernel_launches import attention_form, on_device
from torch.nn.attention import SDPBackend, sdpa_kernel

FP32, FP16 = torch.float32, torch.float16


class Mutant(NamedTuple):
    """``old``, which the file of kernels/ holds exactly once, becomes ``new``; the check is to fail."""

    file: str
    fault: str
    old: str
    new: str
    check: str


def _attention(
    kernels: ModuleType,
    *,
    regime: str = "",
    dtype: torch.dtype = FP32,
    grad: str | None = None,
    form: str | None = "online",
    small: bool = False,
    **options,
) -> None:
    if regime:
        call = op_cases.regime_call("attention", regime, dtype, batch=1, **options)
    else:
        call = op_cases.build("attention", dtype=dtype, **options)
    if small:
        call["qkv"] = call["qkv"] * 3e-3  # where eps is as large as the variance
    with attention_form(kernels, form):
        attention_within_contract(kernels, on_device(call), grad)


def _embed(kernels: ModuleType, *, dtype: torch.dtype = FP32, grad: str | None = None, **options) -> None:
    call = op_cases.build("patch_embed", dtype=dtype, **options)
    embed_within_contract(kernels, on_device(call), grad)


def _least_float(kernels: ModuleType, grad: str | None = None) -> None:
    call = op_cases.build("attention", dtype=FP32, tokens=17)
    call["attn_mask"] = torch.zeros(17, 17)
    call["attn_mask"][5], call["attn_mask"][:, 9] = (torch.finfo(FP32).min,) * 2
    with attention_form(kernels, "online"), sdpa_kernel(SDPBackend.MATH):
        attention_within_contract(kernels, on_device(call), grad)


_HEADS = {"head_dim": 64, "form": "heads", "grad": "contiguous"}
CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "forward": partial(_attention, regime="randn", tokens=17, head_dim=32),
    "forward, resident": partial(_attention, regime="randn", tokens=50, head_dim=32, form="resident"),
    "forward, split head": partial(_attention, regime="randn", tokens=17, head_dim=72),
    "tail last": partial(_attention, regime="randn", tokens=35, head_dim=32, form=None),
    "tail": partial(_attention, regime="logits_negative", tokens=17, head_dim=32),
    "tail, resident": partial(_attention, regime="logits_negative", tokens=50, head_dim=32, form="resident"),
    "masked": partial(_attention, regime="masked", tokens=17, head_dim=32),
    "masked by bool": partial(_attention, regime="masked_bool", tokens=17, head_dim=32),
    "least float": _least_float,
    "backward, least float": partial(_least_float, grad="contiguous"),
    "key mask": partial(_attention, key_mask=True, tokens=17),
    "large logits": partial(_attention, regime="logits_100", dtype=FP16, tokens=50, head_dim=32),
    "layer norm": partial(_attention, norm="layer_norm", tokens=17),
    "rms norm": partial(_attention, norm="rms_norm", affine="weight", tokens=17),
    "rotary": partial(_attention, rope="half", prefix=3, tokens=17),
    "interleaved": partial(_attention, rope="interleaved", prefix=3, tokens=17),
    "backward": partial(_attention, regime="randn", tokens=80, head_dim=32, grad="contiguous"),
    "backward, tail last": partial(
        _attention, regime="randn", tokens=35, head_dim=32, form=None, grad="contiguous"
    ),
    "backward, tail": partial(
        _attention, regime="logits_negative", dtype=FP16, tokens=17, head_dim=32, grad="contiguous"
    ),
    "backward, masked": partial(_attention, regime="masked_bool", tokens=17, head_dim=32, grad="contiguous"),
    "backward, transposed": partial(_attention, tokens=17, grad="transposed"),
    "backward, layer norm": partial(_attention, norm="layer_norm", tokens=17, grad="contiguous"),
    "backward, rotary": partial(_attention, rope="half", prefix=3, tokens=17, grad="contiguous"),
    "heads": partial(_attention, regime="randn", tokens=50, heads=2, **_HEADS),
    "heads, four chunks": partial(_attention, regime="randn", tokens=193, **_HEADS),
    "heads, few keys": partial(_attention, regime="randn", tokens=257, **_HEADS),
    "heads, tail": partial(_attention, regime="logits_negative", dtype=FP16, tokens=17, **_HEADS),
    "heads, tail of few": partial(_attention, regime="logits_negative", dtype=FP16, tokens=257, **_HEADS),
    "heads, transposed": partial(_attention, tokens=17, head_dim=64, form="heads", grad="transposed"),
    "embed": partial(_embed, width=24),
    "embed, patch positions": partial(_embed, width=24, positions="patches", prefix=5),
    "embed, bytes": partial(_embed, width=24, images="uint8", normalized="tensors", dtype=FP16),
    "embed, backward": partial(_embed, width=24, batch=3, grad="contiguous"),
}

_ORDER = "if part == (0 if TAIL_FIRST else 1):"
_FACTOR = "factor = scale * LOG2E"
_ROTATED = "a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b"
_TURNED_BACK = "grad_a * cos_a + grad_b * sin_b, grad_b * cos_b - grad_a * sin_a"
_NOT_PREFIX = "inside = ((rows >= prefix) & (rows < tokens))"
_CENTRED = "a - mean[:, None], 0.0)"
_DQ = "(product(grad_a, grad_b, v_a, v_b, V, F) - delta[:, None])"
_DK = "(product(v_a, v_b, grad_a, grad_b, V, F) - delta[None, :])"
_GRAD_OF_NORM = "grad_a - mean[:, None] - x_a * along[:, None]"

_ROWS: dict[str, list[tuple[str, str, str, str]]] = {
    "attention_score.py": [
        ("scale x1.001", _FACTOR, f"{_FACTOR} * 1.001", "forward"),
        ("tail mask dropped", "tl.where(keys < count, s, ", "tl.where(keys < count + 64, s, ", "tail"),
        ("tail mask off by one", "tl.where(keys < count, s, ", "tl.where(keys <= count, s, ", "tail"),
        ("tail mask a key short", "tl.where(keys < count, s, ", "tl.where(keys < count - 1, s, ", "forward"),
        ("key mask turned round", "seen != 0, 0.0", "seen == 0, 0.0", "key mask"),
        ("mask turned round", "(value != 0) |", "(value == 0) |", "masked by bool"),
        ("bias in units of e", "LOWEST, value * LOG2E)", "LOWEST, value)", "masked"),
        ("the least float is -inf", "value < LOWEST / LOG2E", "value < 0 * LOWEST - 3.41e38", "least float"),
        (
            "a low row's sum dropped",
            "LOWEST + LOWEST / 32 * tl.log2(total)",
            "LOWEST",
            "backward, least float",
        ),
        ("a low row's base dropped", "        s -= base\n", "        s -= 0.0\n", "backward, least float"),
        ("bias added twice", "LOWEST, value * LOG2E)", "LOWEST, value * 2 * LOG2E)", "masked"),
        (
            "second part dropped",
            "if P.b_width > 0:\n        s = tl.dot",
            "if False:\n        s = tl.dot",
            "forward, split head",
        ),
        ("log-sum-exp in units of log 2", "tl.log2(total)) * LN2", "tl.log2(total))", "forward"),
        ("a dead row divided", "tl.where(total == 0.0, 1.0, total)", "total", "masked by bool"),
        ("-inf less -inf", 'tl.where(top == float("-inf"), 0.0, top)', "top", "masked by bool"),
        (
            "a dead row's lse kept",
            'tl.where(lse == float("-inf"), float("inf"), lse)',
            "lse",
            "backward, masked",
        ),
        ("delta = 0", "delta = tl.sum(", "delta = 0 * tl.sum(", "backward"),
        ("tail left out", _ORDER, "if TAIL_FIRST and part == 0:", "tail last"),
        ("tail left out, backward", _ORDER, "if TAIL_FIRST and part == 0:", "backward, tail last"),
        ("tail taken twice", _ORDER, "if True:", "forward"),
    ],
    "attention_fwd.py": [
        ("sum not rescaled", "total = total * fade +", "total = total +", "large logits"),
        ("maximum not kept", "new_top = tl.maximum(top, new_top)", "new_top += 0.0", "large logits"),
        ("accumulator not rescaled", "acc_a *= fade[:, None]", "acc_a *= 1.0", "large logits"),
        (
            "weights in half before the sum",
            "tl.sum(weights, axis=1)",
            "tl.sum(weights.to(tl.float16), axis=1)",
            "forward",
        ),
        ("each chunk the first", "V, F, c == 0)", "V, F, True)", "forward, resident, two chunks"),
        ("a chunk's keys twice", "first += CHUNKS[c]", "first += 0", "forward, resident, two chunks"),
        ("k by the stride of q", "k = (k_ptr, stride_k,", "k = (k_ptr, stride_q + 1,", "forward"),
        ("k by the norm of q", "stride_k, (k_weight_ptr,", "stride_k, (q_weight_ptr,", "layer norm"),
    ],
    "attention_load.py": [
        ("eps dropped", "P.dim + eps)", "P.dim)", "small norms"),
        ("unbiased variance", "P) / P.dim + eps)", "P) / (P.dim - 1) + eps)", "layer norm"),
        ("mean not taken off", _CENTRED, _CENTRED.replace(" - mean[:, None]", ""), "layer norm"),
        (
            "layer norm for rms norm",
            'if F.norm == "layer_norm":\n        mean = row_sum(a',
            "if True:\n        mean = row_sum(a",
            "rms norm",
        ),
        ("turned back", _ROTATED, "a, b = a * cos_a + b * sin_a, b * cos_b - a * sin_b", "rotary"),
        (
            "interleaved turned back",
            _ROTATED,
            "a, b = a * cos_a + b * sin_a, b * cos_b - a * sin_b",
            "interleaved",
        ),
        ("prefix rotated", _NOT_PREFIX, _NOT_PREFIX.replace(">= prefix", ">= 1"), "rotary"),
        ("gradient turned on", _TURNED_BACK, _TURNED_BACK.replace("+", "-", 1), "backward, rotary"),
        ("norm's second term dropped", _GRAD_OF_NORM, "grad_a - mean[:, None]", "backward, layer norm"),
        ("norm's first term dropped", _GRAD_OF_NORM, "grad_a - x_a * along[:, None]", "backward, layer norm"),
        (
            "last row unwritten",
            "mask=(rows < count)[:, None] & (lanes < LANES)[None, :])",
            "mask=(rows < count - 1)[:, None] & (lanes < LANES)[None, :])",
            "forward",
        ),
    ],
    "attention_bwd_keys.py": [
        (
            "dv not accumulated",
            "dv_a, dv_b = accumulate(dv_a, dv_b, p,",
            "dv_a, dv_b = accumulate(0 * dv_a, dv_b, p,",
            "backward",
        ),
        ("delta not taken off", _DK, _DK.replace(" - delta[None, :]", ""), "backward"),
        ("scale of dk dropped", "dk_a * scale", "dk_a", "backward"),
    ],
    "attention_bwd_heads.py": [
        ("delta = 0", "delta = tl.sum(", "delta = 0 * tl.sum(", "heads"),
        ("delta not taken off", "- tl.load(notes)[None, :]", "", "heads"),
        ("scale x1.001", "LOG2E) - tl.load(notes + 16)[N", "LOG2E * 1.001) - tl.load(notes + 16)[N", "heads"),
        ("scale of dk dropped", "dk * scale", "dk", "heads"),
        ("scale of dq dropped", "dqs[j] * scale", "dqs[j]", "heads"),
        ("dq not accumulated", "ds, dqs[j],", "ds, 0 * dqs[j],", "heads"),
        ("dv not accumulated", "grads[j], dv,", "grads[j], 0 * dv,", "heads"),
        (
            "weights not masked",
            "if EDGE:\n            # Keys",
            "if False:\n            # Keys",
            "heads, tail",
        ),
        ("notes over one another", "rows // 16 *", "rows // 32 *", "heads"),
        (
            "notes of the first block",
            "pointers too.\n        notes = _notes(dqkv_ptr + j * BLOCKS[0] // 16 * stride",
            "pointers too.\n        notes = _notes(dqkv_ptr",
            "heads",
        ),
        ("a late chunk's v for its k", "k = _load(k_ptr,", "k = _load(v_ptr,", "heads, four chunks"),
        ("a chunk too few", "in tl.static_range(CHUNKS)", "in tl.static_range(CHUNKS - 1)", "heads"),
        ("a row too many", "mask=(rows < tokens)[:, None])", "mask=(rows <= tokens)[:, None])", "heads"),
        (
            "channels taken as side by side",
            "head.to(tl.int64) * dim * stride_grad_channel",
            "head.to(tl.int64) * dim",
            "heads, transposed",
        ),
        ("tail not masked", "(keys < tokens)[None, :]", "(keys >= 0)[None, :]", "heads, tail of few"),
        ("tail: delta not taken off", "- tl.load(notes)[:, None]", "", "heads, few keys"),
        ("tail: scale of dk dropped", "dk_end * scale", "dk_end", "heads, few keys"),
        ("tail: dq not added to", "tl.trans(dss[j]), dq,", "tl.trans(dss[j]), 0 * dq,", "heads, few keys"),
        ("tail: dv not accumulated", "ps[j], dv,", "ps[j], 0 * dv,", "heads, few keys"),
        ("tail: a block too few", "present >> j & 1", "present >> j & 1 and j > 0", "heads, few keys"),
    ],
    "attention_bwd_queries.py": [
        ("delta not taken off", _DQ, _DQ.replace(" - delta[:, None]", ""), "backward"),
        ("tail not masked", "masks, tokens, F, EDGE)", "masks, tokens, F, False)", "backward, tail"),
        ("scale of dq dropped", "dq_a * scale", "dq_a", "backward"),
    ],
    "attention.py": [
        ("a launch left out", 'OWNERS = ("queries", "keys")', 'OWNERS = ("queries",)', "backward"),
        ("keys first", 'OWNERS = ("queries", "keys")', 'OWNERS = ("keys", "queries")', "backward"),
        (
            "norms' shares of the wrong launch",
            "of_q, of_k = [",
            "of_k, of_q = [",
            "backward, layer norm",
        ),
    ],
    "attention_bwd.py": [
        ("owners mistaken", 'if OWNER == "keys":', 'if OWNER != "keys":', "backward"),
        (
            "channels taken as side by side",
            "head.to(tl.int64) * dim * stride_grad_channel",
            "head.to(tl.int64) * dim",
            "backward, transposed",
        ),
    ],
    "patch_embed_projection.py": [
        (
            "shift from the unrounded weight x2",
            "shift = (folded.double()",
            "shift = (2 * folded.double()",
            "embed, bytes",
        ),
        ("bytes by 256", "scale = 256 / 255", "scale = 256 / 256", "embed, bytes"),
    ],
}
CHECKS |= {
    "forward, resident, two chunks": partial(
        _attention, regime="randn", tokens=196, head_dim=32, heads=1, form="resident"
    ),
    "small norms": partial(_attention, norm="rms_norm", affine=None, tokens=17, small=True),
}
MUTANTS = [Mutant(file, *row) for file, rows in _ROWS.items() for row in rows]
