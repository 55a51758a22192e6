"""Faults to put into our own source, a row each, with the name of the check that must see it.

Where a data regime is what shows a fault, the check is made there, in the dtype that hides it best. Faults
that only a hand-written kernel can have (delta = 0 in a backward pass, a low-precision accumulator, a tile
unwritten) come with the kernels.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import op_cases
import torch
from op_checks import equal_in_float64, within_contract

BF16, FP32 = torch.bfloat16, torch.float32
LINEAR, RESIDUAL, MLP = "layer_norm_linear", "linear_residual", "layer_norm_mlp"


class Mutant(NamedTuple):
    """``old``, which the file of fastvit holds exactly once, becomes ``new``; the check is to fail."""

    file: str
    fault: str
    old: str
    new: str
    check: str


def _exact(op: str, ops: ModuleType, **options) -> None:
    """In float64 the op with these options is its plain statement."""
    equal_in_float64(op, op_cases.build(op, **options), getattr(ops, op))


def _contract(op: str, dtype: torch.dtype, ops: ModuleType, regime: str = "", **options) -> None:
    """The op, on data of this regime or with these options, is within the contract."""
    call = op_cases.regime_call(op, regime, dtype) if regime else op_cases.build(op, dtype=dtype, **options)
    within_contract(op, call, getattr(ops, op))


def _strided(op: str, name: str, ops: ModuleType) -> None:
    """What the op returns is contiguous, where this input is not."""
    call = op_cases.build(op, dtype=FP32)
    call[name] = call[name].transpose(0, 1).contiguous().transpose(0, 1)
    within_contract(op, call, getattr(ops, op))


_attention = partial(partial, _exact, "attention")
_embed = partial(partial, _exact, "patch_embed")
_mlp = partial(partial, _exact, MLP)

CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "attention": _attention(),
    "attention, scale": _attention(scale=0.3),
    "attention, mask": _attention(mask="bool"),
    "attention, causal": _attention(mask="causal"),
    "attention, key mask": _attention(key_mask=True),
    "attention, key mask and mask": _attention(key_mask=True, mask="bool"),
    "attention, key mask and float mask": _attention(key_mask=True, mask="float"),
    "attention, key mask and causal": _attention(key_mask=True, mask="causal"),
    "attention, rms_norm": _attention(norm="rms_norm", affine=None),
    "attention, layer_norm": _attention(norm="layer_norm"),
    "attention, rotary": _attention(rope="half", prefix=3),
    "attention, interleaved": _attention(rope="interleaved", prefix=3),
    "attention fp32": partial(_contract, "attention", FP32, regime="randn"),
    "attention bf16, masked": partial(_contract, "attention", BF16, regime="masked_bool"),
    "attention bf16, causal": partial(_contract, "attention", BF16, mask="causal"),
    "attention, strided": partial(_strided, "attention", "qkv"),
    "norm bf16": partial(_contract, LINEAR, BF16, regime="randn"),
    "norm bf16, width 16": partial(_contract, LINEAR, BF16, regime="width_16"),
    "norm bf16, mean offset": partial(_contract, LINEAR, BF16, regime="mean_offset"),
    "norm bf16, small std": partial(_contract, LINEAR, BF16, regime="small_std"),
    "norm bf16, rms_norm": partial(_contract, LINEAR, BF16, norm="rms_norm", affine="weight"),
    "residual bf16": partial(_contract, RESIDUAL, BF16, regime="randn"),
    "residual bf16, depth": partial(_contract, RESIDUAL, BF16),
    "residual, strided": partial(_strided, RESIDUAL, "residual"),
    "mlp bf16": partial(_contract, MLP, BF16, regime="randn"),
    "mlp bf16, small std": partial(_contract, MLP, BF16, regime="small_std"),
    "mlp bf16, inner norm": partial(_contract, MLP, BF16, inner_norm="weight"),
    "mlp fp32": partial(_contract, MLP, FP32, regime="randn"),
    "mlp, quick_gelu": _mlp(activation="quick_gelu"),
    "mlp, packed swiglu": _mlp(activation="swiglu"),
    "mlp, own gate": _mlp(activation="swiglu, own gate"),
    "embed, prefix": _embed(prefix=5),
    "embed, patch positions": _embed(positions="patches"),
    "embed, bytes": _embed(images="uint8"),
    "embed, colours": _embed(normalized="tensors"),
    "embed, colours as lists": _embed(normalized="sequences"),
    "embed bf16": partial(_contract, "patch_embed", BF16, regime="randn"),
    "embed bf16, bytes": partial(_contract, "patch_embed", BF16, images="uint8", normalized="tensors"),
    "embed fp32, patches only": partial(_contract, "patch_embed", FP32, prefix=0, positions=None),
}

LAYER_NORM = "return F.layer_norm(x, x.shape[-1:], weight, bias, eps)"
RMS_NORM = "return F.rms_norm(x, x.shape[-1:], weight, eps)"
WIDE_X = "x.to(torch.promote_types(x.dtype, torch.float32))"
MEAN, VARIANCE = f"{WIDE_X}.mean(-1, keepdim=True)", f"{WIDE_X}.var(-1, correction=0, keepdim=True)"
REWRITTEN = f"return (({WIDE_X} - {MEAN}) * ({VARIANCE} + eps).rsqrt() * weight + bias).to(x.dtype)"
UNBIASED = REWRITTEN.replace("correction=0", "correction=1")
ROUNDED = REWRITTEN.replace("keepdim=True)", "keepdim=True).bfloat16()")
EPS, LARGER_EPS = "eps: float = 1e-6", "eps: float = 1e-5"
DEAD = ".masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)"
TURNED = "torch.cat([prefix, turned], dim=2)"
SWAPPED = '_quarter_turn(tokens, {"half": "interleaved", "interleaved": "half"}[layout])'
CONV = "F.conv2d(x, weight, bias, stride=weight.shape[2:])"
POSITIONS = "    if pos_embed is not None:\n        tokens = "
TAIL = "torch.cat([tokens[:, :-num_patches], (tokens + pos_embed)[:, -num_patches:]], dim=1)"
KEYS_TRIANGLE = "device=keys.device).tril()"
GATE = "F.linear(h, gate_weight, gate_bias)"
LINEAR_OF_X = "F.linear(x, weight, bias)"
PAIRS = "[-x[..., 1::2], x[..., ::2]]"
WIDE = "in (dtype, images.dtype) else "

_ROWS: dict[str, list[tuple[str, str, str, str]]] = {
    "ops/attention.py": [
        ("q and k swapped", "q, k, v = qkv", "k, q, v = qkv", "attention"),
        (
            "parts and heads swapped",
            "3, num_heads, head_dim).unbind(2)",
            "num_heads, 3, head_dim).unbind(3)",
            "attention",
        ),
        ("heads and channels swapped", "3, num_heads, head_dim)", "3, head_dim, num_heads).mT", "attention"),
        ("scale dropped", '"scale": scale,\n', '"scale": None,\n', "attention, scale"),
        ("eps 1e-5 for 1e-6", EPS, LARGER_EPS, "attention, rms_norm"),
    ],
    "reference/attention.py": [
        ("scale x1.001 in the oracle", "else scale)\n", "else scale) * 1.001\n", "attention"),
        ("scale x1.001", "scale=scale)", "scale=1.001 * q.shape[-1] ** -0.5)", "attention fp32"),
        ("key mask dropped", "if key_mask is not None:", "if False:", "attention, key mask"),
        ("key mask for mask", "return attn_mask & keys", "return keys", "attention, key mask and mask"),
        ("key mask turned round", "where(keys,", "where(~keys,", "attention, key mask and float mask"),
        ("mask off by one", "device=q.device).tril()", "device=q.device).tril(1)", "attention, causal"),
        ("its mask off by one", KEYS_TRIANGLE, KEYS_TRIANGLE[:-1] + "1)", "attention, key mask and causal"),
        (
            "causal mask dropped",
            "is_causal=is_causal, scale",
            "is_causal=False, scale",
            "attention bf16, causal",
        ),
        ("mask dropped", "attn_mask=attn_mask, dropout", "attn_mask=None, dropout", "attention bf16, masked"),
        ("wholly masked rows NaN", DEAD, ".softmax(dim=-1)", "attention, mask"),
        (
            "k by the norm of q",
            "normalize(k, k_norm_weight",
            "normalize(k, q_norm_weight",
            "attention, layer_norm",
        ),
        ("rotation dropped", "if rope_cos is not None:", "if False:", "attention, rotary"),
        ("rotation of k dropped", "k = rotate(k,", "rotate(k,", "attention, rotary"),
        ("output strided", ".flatten(2).contiguous()", ".flatten(2)", "attention, strided"),
    ],
    "reference/rotary.py": [
        ("prefix rotated", TURNED, TURNED.replace("prefix", "prefix * cos[..., :1, :]"), "attention, rotary"),
        ("layouts swapped", "_quarter_turn(tokens, layout)", SWAPPED, "attention, rotary"),
        ("half turned back", "[-second, first]", "[second, -first]", "attention, rotary"),
        ("pairs turned back", PAIRS, f"[-pair for pair in {PAIRS}]", "attention, interleaved"),
    ],
    "reference/normalization.py": [
        ("unbiased variance", LAYER_NORM, UNBIASED, "norm bf16, width 16"),
        ("statistics in bf16", LAYER_NORM, ROUNDED, "norm bf16, mean offset"),
        ("rms_norm for layer_norm", LAYER_NORM, RMS_NORM, "norm bf16"),
        ("layer_norm for rms_norm", RMS_NORM, LAYER_NORM, "norm bf16, rms_norm"),
    ],
    "reference/activations.py": [
        ("tanh for erf", '"gelu": F.gelu', '"gelu": partial(F.gelu, approximate="tanh")', "mlp fp32"),
        ("1.7 for 1.702", "sigmoid(1.702 * x)", "sigmoid(1.7 * x)", "mlp, quick_gelu"),
    ],
    "ops/layer_norm_linear.py": [("eps 1e-5 for 1e-6", EPS, LARGER_EPS, "norm bf16, small std")],
    "reference/layer_norm_linear.py": [
        ("bias added twice", "weight, bias)", "weight, bias) + bias", "norm bf16")
    ],
    "ops/linear_residual.py": [
        ("depth dropped", '"sample_scale": s', '"sample_scale": None and s', "residual bf16, depth"),
    ],
    "reference/linear_residual.py": [
        ("LayerScale dropped", "y = y * layer_scale", "y = y", "residual bf16"),
        ("depth dropped", "if sample_scale is not None:", "if False:", "residual bf16, depth"),
        ("residual dropped", "(residual + y)", "y", "residual bf16"),
        ("bias added twice", LINEAR_OF_X, f"{LINEAR_OF_X} + bias", "residual bf16"),
        ("output strided", ".contiguous()", "", "residual, strided"),
    ],
    "ops/layer_norm_mlp.py": [("eps 1e-5 for 1e-6", EPS, LARGER_EPS, "mlp bf16, small std")],
    "reference/layer_norm_mlp.py": [
        ("gate and value swapped", "gate, value = value", "value, gate = value", "mlp, packed swiglu"),
        ("bias of the gate dropped", GATE, GATE.replace(", gate_bias", ""), "mlp, own gate"),
        ("inner norm dropped", "if inner_norm_weight is not None:", "if False:", "mlp bf16, inner norm"),
        ("first bias added twice", "fc1_bias)  #", "fc1_bias) + fc1_bias  #", "mlp bf16"),
        ("second bias added twice", "fc2_bias), l", "fc2_bias) + fc2_bias, l", "mlp bf16"),
        ("residual dropped", "add_scaled(x,", "add_scaled(0 * x,", "mlp bf16"),
        ("LayerScale dropped", "layer_scale, sample_scale)\n", "None, sample_scale)\n", "mlp bf16"),
    ],
    "ops/patch_embed.py": [
        (
            "mean and std swapped",
            "s, mean=mean, std=std)\n\n",
            "s, mean=std, std=mean)\n\n",
            "embed, colours",
        ),
        ("listed colours rounded", "value), wide", "value), torch.float32", "embed, colours as lists"),
    ],
    "reference/patch_embed.py": [
        ("bytes not divided", "x = x / 255", "x = x", "embed, bytes"),
        ("bytes divided by 256", "x = x / 255", "x = x / 256", "embed bf16, bytes"),
        ("colours in bf16", WIDE + "torch.float32", WIDE + "dtype", "embed bf16, bytes"),
        ("no positions for the prefix", POSITIONS + "tokens + pos_embed", POSITIONS + TAIL, "embed, prefix"),
        (
            "no patch positions",
            "tokens, pos_embed = tokens + pos_embed, None",
            "pos_embed = None",
            "embed, patch positions",
        ),
        ("bias added twice", CONV, f"({CONV} + bias.view(-1, 1, 1))", "embed bf16"),
        ("rows and columns swapped", ".flatten(2).transpose", ".mT.flatten(2).transpose", "embed bf16"),
        ("output strided", "tokens.contiguous()", "tokens", "embed fp32, patches only"),
    ],
}
MUTANTS = [Mutant(file, *row) for file, rows in _ROWS.items() for row in rows]
