"""The checks that faults in the compiled ops fail, each in a process of its own.

Ops can be registered once in a process: this file, run with libraries and checks as lines of its input, forks
for each and prints a verdict for each.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import op_cases
import torch
import torch.nn.functional as F
from memory import poisoned_empty
from native_calls import FIXED, THROUGH, frozen, while_training
from op_checks import GRADS, gradients_within_contract, within_contract

from fastvit import extension, native_backend, use_backend
from fastvit.ops import native

FP32, BF16 = torch.float32, torch.bfloat16
LINEAR, RESIDUAL, MLP = "layer_norm_linear", "linear_residual", "layer_norm_mlp"
# More rows than the few that MKL multiplies, and two chunks of a sum and some.
SIZES = {"batch": 3, "tokens": 27}


def _call(op: str, dtype: torch.dtype, regime: str | None, options: dict) -> op_cases.Call:
    if regime:
        return op_cases.regime_call(op, regime, dtype, **SIZES, **options)
    hidden = {"hidden": 104} if op == MLP else {}
    call = op_cases.build(op, dtype=dtype, **SIZES, width=136, **hidden, **options)
    if call.get("sample_scale") is not None:
        call["sample_scale"] = torch.tensor([1.25, 0, 2.5], dtype=dtype)
    return call


def _forward(op: str, dtype: torch.dtype = FP32, regime: str | None = None, **options) -> None:
    """The output is within the contract, also as it is for training, and with packed and folded weights."""
    call, how = _call(op, dtype, regime, options), {"offset_regime": regime == "mean_offset"}
    for function in (None, while_training(op), frozen(op)):
        within_contract(op, call, function, **how)


def _backward(op: str, dtype: torch.dtype = FP32, regime: str | None = None, **options) -> None:
    """So are the gradients."""
    how = {"offset_regime": regime == "mean_offset", "through": THROUGH.get(op, ()), "without": FIXED}
    gradients_within_contract(op, _call(op, dtype, regime, options), GRADS["contiguous"], **how)


def _attention(**options) -> None:
    """Of several strips, blocks and panels, none of them whole."""
    call = op_cases.build("attention", dtype=FP32, batch=2, tokens=53, head_dim=22, **options)
    with torch.no_grad():
        within_contract("attention", call)


def _near(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert (found.double() - truth).abs().max() < 3e-6 * truth.abs().max()


def _product(rows: int, *widths: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    extension.load_ops("cpu")
    generator = torch.Generator().manual_seed(rows)
    of = partial(torch.randn, generator=generator)
    return of(1, rows, 300), [of(width, 300) / 17 for width in widths], [of(width) for width in widths]


def _several() -> None:
    """Several weights, as they lie, give their outputs side by side."""
    x, weights, biases = _product(250, 48, 40, 33)
    options = (1e-6, "layer_norm", [], None, False, False)
    out, _ = native.ops.layer_norm_linear_fwd(x, None, None, weights, biases, *options)
    normalised = F.layer_norm(x.double(), (300,), eps=1e-6)
    _near(out, F.linear(normalised, torch.cat(weights).double(), torch.cat(biases).double()))


def _layer_scale() -> None:
    """LayerScale as a vector in the product's epilogue."""
    x, (weight,), (bias,) = _product(250, 40)
    residual, scale = torch.randn(1, 250, 40), torch.randn(40)
    out, _ = native.ops.linear_residual_fwd(x, weight, bias, residual, scale, None, False, False, False)
    _near(out, residual + scale * F.linear(x.double(), weight.double(), bias.double()))


_linear, _residual, _mlp = (partial(partial, _forward, op) for op in (LINEAR, RESIDUAL, MLP))
_dlinear, _dresidual, _dmlp = (partial(partial, _backward, op) for op in (LINEAR, RESIDUAL, MLP))

CHECKS: dict[str, Callable[[], None]] = {
    "linear": _linear(regime="randn"),
    "linear, rms": _linear(norm="rms_norm", affine="weight"),
    "linear bf16": _linear(BF16, "randn"),
    "linear bf16, offset": _linear(BF16, "mean_offset"),
    "linear bf16, small std": _linear(BF16, "small_std"),
    "linear bf16, width 16": _linear(BF16, "width_16"),
    "dlinear": _dlinear(regime="randn"),
    "residual": _residual(layer_scale=False, sample_scale=False),
    "residual, scaled": _residual(),
    "dresidual": _dresidual(),
    "several weights": _several,
    "LayerScale": _layer_scale,
    "mlp": _mlp(layer_scale=False, sample_scale=False),
    "mlp, gelu_tanh": _mlp(activation="gelu_tanh"),
    "mlp, quick_gelu": _mlp(activation="quick_gelu"),
    "mlp, silu": _mlp(activation="silu"),
    "mlp, swiglu": _mlp(activation="swiglu"),
    "mlp, inner norm": _mlp(inner_norm="weight and bias"),
    "dmlp": _dmlp(),
    "dmlp bf16": _dmlp(BF16, "randn"),
    "dmlp, gelu_tanh": _dmlp(activation="gelu_tanh"),
    "dmlp, silu": _dmlp(activation="silu"),
    "dmlp, swiglu": _dmlp(activation="swiglu"),
    "attention": _attention,
    "attention, scaled": partial(_attention, scale=20.0),
    "attention, mask": partial(_attention, mask="bool", key_mask=True),
    "attention, causal": partial(_attention, mask="causal"),
    "dmlp, own gate": _dmlp(activation="swiglu, own gate", inner_norm="weight", layer_scale=False),
}


def verdict(library: str, check: str) -> str:
    """ "green", "red" or an error, from a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "green"
        try:
            extension.FOLDER = Path(library).parent
            # Memory handed out again may hold what a faulty op should have written.
            with poisoned_empty(), use_backend("cpp"):
                CHECKS[check]()
        except AssertionError as error:
            said = f"red: {error}"
        except BaseException:  # a child must not go on as its parent would
            said = f"error: {traceback.format_exc()}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read() or "error: it died"


if __name__ == "__main__":
    # The faults are in oneDNN's way on every CPU; that of panels has faults of its own in test_panels.py.
    native_backend.vectors = lambda: "AVX512"
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    for line in sys.stdin:
        print(json.dumps(verdict(*line.rstrip("\n").split("\t"))), flush=True)
