"""Calls of the five public ops: every option of each, combined pairwise, as keyword arguments."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from op_inputs import BUILDERS

from fastvit.regimes import DTYPES, REGIMES, pairwise, regimes_of

Call = dict[str, Any]

# What a call can vary in, with a value of each kind. Sizes are not here: each test chooses its own.
OPTIONS: dict[str, dict[str, tuple]] = {
    "patch_embed": {
        "bias": (True, False),
        "positions": ("all", "patches", None),
        "prefix": (1, 0, 5),
        "normalized": (None, "tensors", "sequences", "mean", "std"),
        "images": ("float", "uint8"),
        "patch": ((4, 4), (2, 3)),
    },
    "layer_norm_linear": {
        "norm": ("layer_norm", "rms_norm"),
        "affine": ("weight and bias", "weight", None),
        "bias": (True, False),
        "eps": (None, 1e-3),
    },
    "attention": {
        "scale": (None, 0.3),
        "mask": (None, "bool", "float", "causal"),
        "key_mask": (False, True),
        "norm": (None, "layer_norm", "rms_norm"),
        "affine": ("weight and bias", "weight", None),
        "rope": (None, "half", "interleaved", "half, a table a head"),
        "prefix": (0, 1, 3),
    },
    "linear_residual": {
        "bias": (True, False),
        "layer_scale": (True, False),
        "sample_scale": (True, False),
        "inner": (12, 5),
    },
    "layer_norm_mlp": {
        "norm": ("layer_norm", "rms_norm"),
        "affine": ("weight and bias", "weight", None),
        "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu", "swiglu, own gate"),
        "inner_norm": (None, "weight and bias", "weight"),
        "biases": (True, False),
        "layer_scale": (True, False),
        "sample_scale": (True, False),
        "eps": (None, 1e-3),
    },
}
# The call with most in it, for tests of what the options do not touch.
FULL: dict[str, Call] = {
    "patch_embed": {"normalized": "tensors"},
    "layer_norm_linear": {},
    "attention": {"mask": "bool", "key_mask": True, "norm": "layer_norm", "rope": "half", "prefix": 1},
    "linear_residual": {},
    "layer_norm_mlp": {"activation": "swiglu, own gate", "inner_norm": "weight and bias"},
}


def regime_cells(
    op: str, allowed: Callable[[Call], bool] = lambda cell: True, /, **axes: tuple
) -> list[Call]:
    """Data regimes with dtypes and sizes, pairwise; left out is what ``allowed`` does not allow."""
    return pairwise(
        lambda cell: cell["regime"] in regimes_of(op, cell["dtype"]) and allowed(cell),
        regime=[name for name, regime in REGIMES.items() if op in regime.ops],
        dtype=DTYPES,
        **axes,
    )


@cache
def cells(op: str, **axes: tuple) -> list[Call]:
    """Options of the op, pairwise; left out are combinations that say nothing (a norm's bias, no norm)."""
    return pairwise(partial(_says_something, op), **OPTIONS[op], **axes)


def name(cell: Call | str) -> str:
    """A test's id, of an op or its options."""
    if isinstance(cell, str):
        return cell
    return ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in cell.items())


def build(op: str, *, dtype: torch.dtype = torch.float64, **options) -> Call:
    """Keyword arguments for the public op in the dtype; always the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, wide: bool = False) -> torch.Tensor:
        tensor = torch.randn(size, generator=generator, dtype=torch.float64)
        # Tables of positions and colours stay in float32 beside half-precision tensors, as in real models.
        return tensor.to(torch.promote_types(dtype, torch.float32) if wide else dtype)

    call = BUILDERS[op](randn, **options)
    return {key: value for key, value in call.items() if key != "eps" or value is not None}


def regime_call(
    op: str, regime: str, dtype: torch.dtype, *, activation: str | None = None, **sizes: int
) -> Call:
    """The contract's inputs as the public op takes them: q, k and v packed.

    The MLP's with any activation: packed "swiglu" has half the hidden width, and a gate of its own is fc1
    turned round.
    """
    call = REGIMES[regime].inputs(op, dtype, **sizes)
    if op == "attention":
        packed = torch.stack([call.pop(part) for part in "qkv"], dim=2)
        call |= {"qkv": packed.flatten(2), "num_heads": packed.shape[3]}
    if activation == "swiglu":
        call["fc2_weight"] = call["fc2_weight"][:, : len(call["fc1_weight"]) // 2].contiguous()
    if activation == "swiglu, own gate":
        call |= {"gate_weight": call["fc1_weight"].flip(0), "gate_bias": call["fc1_bias"].flip(0)}
    return call | ({"activation": activation.partition(",")[0]} if activation else {})


def converted(call: Call, change: Callable[[torch.Tensor], torch.Tensor], *, floating: bool = False) -> Call:
    """The call with every tensor, or every floating one, changed."""
    return {
        key: change(value)
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or not floating)
        else value
        for key, value in call.items()
    }


def float64(call: Call) -> Call:
    """The same numbers for the oracle; bytes and masks as they are."""
    return converted(call, torch.Tensor.double, floating=True)


def tensors(call: Call) -> dict[str, torch.Tensor]:
    """The floating tensors, which can have gradients."""
    return {
        key: value
        for key, value in call.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _says_something(op: str, cell: Call) -> bool:
    if op == "attention" and cell["norm"] is None and cell["affine"] is not None:
        return False
    if op == "attention" and cell["rope"] is None and cell["prefix"]:
        return False
    if cell.get("norm") == "rms_norm" and "weight and bias" in (cell["affine"], cell.get("inner_norm")):
        return False
    return op != "patch_embed" or cell["prefix"] or cell["positions"] != "patches"
