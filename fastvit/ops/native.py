"""The compiled ops as the dispatcher knows them, and the weights as they read them.

    fastvit_native::<op>_fwd(...) -> output, what it saves
    fastvit_native::<op>_bwd(...) -> the gradients that are needed, in order

The libraries register the CPU's and CUDA's functions for them when fastvit.extension loads them. Nothing here
is differentiable or traced: fastvit::<op>_fwd and <op>_bwd, registered beside each op, call these.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from .. import native_backend
from ..derived import drop, kept
from .registration import NAMESPACE

MLP_WEIGHTS = (
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? gate_weight, "
    "Tensor? gate_bias, Tensor? inner_norm_weight, Tensor? inner_norm_bias, Tensor? layer_scale, "
    "Tensor? sample_scale"
)
MLP_SAVED_WEIGHTS = (
    "Tensor fc1_weight, Tensor fc2_weight, Tensor? gate_weight, Tensor? inner_norm_weight, "
    "Tensor? inner_norm_bias, Tensor? layer_scale, Tensor? sample_scale"
)
SCHEMAS = (
    "layer_norm_linear_fwd(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, "
    "Tensor[] biases, float eps, str norm, Tensor[] folded, Tensor? moments, bool save, bool tf32) "
    "-> (Tensor, Tensor[])",
    "layer_norm_linear_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight, float eps, str norm, int needs, bool tf32) -> Tensor[]",
    "linear_residual_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, "
    "Tensor? sample_scale, bool save, bool with_moments, bool tf32) -> (Tensor, Tensor[])",
    "linear_residual_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor weight, Tensor? layer_scale, "
    "Tensor? sample_scale, int needs, bool tf32) -> Tensor[]",
    f"layer_norm_mlp_fwd(Tensor x, Tensor? norm_weight, Tensor? norm_bias, {MLP_WEIGHTS}, float eps, "
    "str activation, str norm, Tensor[] folded, Tensor? moments, bool save, bool with_moments, bool fused, "
    "bool tf32) -> (Tensor, Tensor[])",
    f"layer_norm_mlp_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor? norm_weight, Tensor? norm_bias, "
    f"{MLP_SAVED_WEIGHTS}, float eps, str activation, str norm, int needs, bool fused, bool tf32) "
    "-> Tensor[]",
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor",
)
_library = Library(f"{NAMESPACE}_native", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
ops = getattr(torch.ops, f"{NAMESPACE}_native")


# Of so few rows oneDNN's products are less exact than MKL's by more than the contract allows.
FEW_ROWS = 16
PANEL = 16  # rows of a weight
MOMENT_COLUMNS = 64  # as csrc/row_moments.h has them


class Product(NamedTuple):
    """As a library reads it: weights whose outputs lie side by side, a bias for each or none, LayerScale."""

    weights: list[Tensor]
    biases: list[Tensor]
    layer_scale: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """Of a single weight."""
        return self.biases[0] if self.biases else None


def as_they_lie(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scale: Tensor | None,
    dtype: torch.dtype,
    frozen: bool,
) -> bool:
    """Whether ``product`` makes and keeps no tensor, for all calls with such metadata."""
    of_one_dtype = all(tensor.dtype == dtype for tensor in (*weights, *biases))
    return of_one_dtype and not (frozen and _is_copied(x, weights, scale, dtype))


def product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scale: Tensor | None,
    dtype: torch.dtype,
    frozen: bool,
) -> Product:
    """Weights [O, K] each, biases and LayerScale as they are to be read beside x [B, N, K], in ``dtype``.

    Of frozen weights a copy is kept: one below the other, cast, LayerScale multiplied in, and on a CPU
    packed, by oneDNN or in panels. Others are read where they lie, and cast at each call where they must be.
    """
    if frozen and _is_copied(x, weights, scale, dtype):
        copy = _frozen_product(x, weights, biases, scale, dtype)
        if copy is not None:
            return copy
    return Product(_cast(weights, dtype), _cast(biases, dtype), scale)


def _is_copied(x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether what a frozen product reads is anything but the weight itself."""
    if scale is not None or len(weights) > 1 or weights[0].dtype != dtype:
        return True
    return _packing(x, weights, dtype) is not None


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _frozen_product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Product | None:
    packs = _packing(x, weights, dtype)
    bias = joined(biases) if biases else None

    def prepared() -> tuple[Tensor, Tensor | None]:
        weight = joined(weights)
        ready = (weight if scale is None else weight * scale[:, None]).to(dtype, copy=True)
        scaled = None if bias is None or scale is None else (bias * scale).to(dtype)
        return packs(ready) if packs else ready, scaled

    # A bias may be made for this call, of others: then nothing that is kept can follow it.
    sources = weights if scale is None else (*weights, bias, scale)
    value = kept(("product", dtype, packs), sources, prepared)
    if value is None:
        return None
    if bias is None:
        return Product([value[0]], [])
    return Product([value[0]], [bias.to(dtype) if scale is None else value[1]])


def release(weights: Sequence[Tensor]) -> None:
    """Free the copies of weights with which gradients are recorded: training is to take no more memory."""
    if not torch.compiler.is_compiling():
        drop(weights)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """[a + b + ..., K] from [a, K], [b, K], ..., and biases likewise."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def folded(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """What becomes of a norm and the product after it where the product is to take rows as they are:

        linear(norm(x)) = (x W'^T - mean(x) sums) rstd(x) + b'
        W' = weight * norm_weight,  b' = bias + weight norm_bias

    Returns W' in ``dtype``, the sums of its rows and b' in float32, of copies kept until a weight or the norm
    changes; or nothing where they cannot be kept.
    """

    def prepared() -> list[Tensor]:
        wide = joined(weights).double()
        ready = (wide if norm_weight is None else wide * norm_weight.double()).to(dtype, copy=True)
        # Of what the product is with: of numbers not yet rounded the sums would leave a part of the mean in.
        sums = ready.double().sum(1)
        shift = torch.zeros_like(sums) if norm_bias is None else wide @ norm_bias.double()
        return [ready, sums.float(), shift.float()]

    if (copy := kept(("folded", dtype), (*weights, norm_weight, norm_bias), prepared)) is None:
        return []
    return [*copy[:2], copy[2] + joined(biases)] if biases else copy


def _packing(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """How a CPU packs weights: with AVX2 the library's own product is the fastest, else oneDNN's."""
    if x.device.type != "cpu" or x.shape[0] * x.shape[1] <= FEW_ROWS:
        return None
    if dtype == torch.float32:
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        own = native_backend.vectors() == "AVX2" and rows % PANEL == 0 and columns > 0
        return panels if own else torch.ops.mkldnn._reorder_linear_weight
    bf16 = dtype == torch.bfloat16 and native_backend.multiplies_bfloat16()
    return torch.ops.mkldnn._reorder_linear_weight if bf16 else None


def panels(weight: Tensor) -> Tensor:
    """A weight [D, K] in panels [D / 16, K, 16], as csrc/panels.h reads them."""
    return weight.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def bits(needs: Sequence[bool]) -> int:
    """``needs`` as the libraries read it: bit i for input i."""
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def statistics_shapes(x: Tensor, rows: int, norm: str, dtype: torch.dtype) -> list[Tensor]:
    """A norm's mean and rstd without data; RMSNorm's mean is empty."""
    of_statistics = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (0 if norm == "rms_norm" else rows, rows)
    return [x.new_empty((size,), dtype=of_statistics) for size in sizes]


def moments_shapes(stream: Tensor, with_moments: bool) -> list[Tensor]:
    """The moments of tokens [B, N, D] without data, if there are any.

    For each 64 channels of a token they are the mean, and the sum of the squares of what is left after it.
    """
    if not with_moments:
        return []
    batch, tokens, width = stream.shape
    of_statistics = torch.float64 if stream.dtype == torch.float64 else torch.float32
    return [stream.new_empty((-(-width // MOMENT_COLUMNS), batch * tokens, 2), dtype=of_statistics)]


def product_shapes(stream: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What LayerScale's gradient needs, without data: the product's rows as wide as the stream [B, N, D]."""
    if layer_scale is None:
        return []
    return [stream.new_empty((stream.shape[0] * stream.shape[1], stream.shape[2]), dtype=dtype)]


def gradient_shapes(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that are needed, without data: contiguous, shaped as the inputs."""
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]
