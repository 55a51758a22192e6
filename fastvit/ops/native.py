"""The compiled ops as the dispatcher knows them, and the weights as they read them.

    fastvit_native::<op>_fwd(...) -> output, what it saves
    fastvit_native::<op>_bwd(...) -> the gradients that are needed, in order

The libraries register the CPU's and CUDA's functions for them when fastvit.extension loads them. Nothing here
is differentiable or traced: fastvit::<op>_fwd and <op>_bwd, registered beside each op, call these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import Library

from .. import measurements, native_backend
from ..call_facts import tf32
from ..derived import kept

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
    "layer_norm_linear_fwd(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, "
    "float eps, str norm, bool save, bool tf32) -> (Tensor, Tensor[])",
    "layer_norm_linear_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight, float eps, str norm, int needs, bool tf32) -> Tensor[]",
    "linear_residual_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, "
    "Tensor? sample_scale, bool save, bool tf32) -> (Tensor, Tensor[])",
    "linear_residual_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor weight, Tensor? layer_scale, "
    "Tensor? sample_scale, int needs, bool tf32) -> Tensor[]",
    f"layer_norm_mlp_fwd(Tensor x, Tensor? norm_weight, Tensor? norm_bias, {MLP_WEIGHTS}, float eps, "
    "str activation, str norm, bool save, bool fused, bool tf32) -> (Tensor, Tensor[])",
    f"layer_norm_mlp_bwd(Tensor grad, Tensor x, Tensor[] saved, Tensor? norm_weight, Tensor? norm_bias, "
    f"{MLP_SAVED_WEIGHTS}, float eps, str activation, str norm, int needs, bool fused, bool tf32) "
    "-> Tensor[]",
)
_library = Library("fastvit_native", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
ops = torch.ops.fastvit_native


# Of so few rows oneDNN's products are less exact than MKL's by more than the contract allows.
FEW_ROWS = 16


def weights(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
    fold: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight, bias and LayerScale of a product as the library is to read them beside x [B, N, K].

    What can be kept until a parameter changes is cast to ``dtype``, with ``fold`` has LayerScale multiplied
    in (None is left of it) and, on a CPU, is packed by oneDNN. What cannot is cast alone.
    """
    packs, factor = _packs(x, dtype), scale if fold else None
    changed = factor is not None or weight.dtype != dtype

    def prepared() -> tuple[Tensor, Tensor | None]:
        ready, ready_bias = weight, None
        if changed:
            ready = (weight if factor is None else weight * factor[:, None]).to(dtype, copy=True)
        if changed and bias is not None:
            ready_bias = (bias if factor is None else bias * factor).to(dtype, copy=True)
        return torch.ops.mkldnn._reorder_linear_weight(ready) if packs else ready, ready_bias

    if keep and (changed or packs):
        value = kept(("linear", dtype, packs), (weight, bias if changed else None, factor), prepared)
        if value is not None:
            return value[0], value[1] if changed else bias, None if fold else scale
    return weight.to(dtype), None if bias is None else bias.to(dtype), scale


def _packs(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and dtype != torch.float64 and x.shape[0] * x.shape[1] > FEW_ROWS


def allows_tf32(x: Tensor) -> bool:
    """Whether the op's float32 products may be tf32, which is torch's setting for its own."""
    return x.is_cuda and tf32("linear")


def fuses(x: Tensor, fc1_weight: Tensor, dtype: torch.dtype, direction: str) -> bool:
    """Whether fc1's product has the activation in its epilogue, if the library has a kernel for the call.

    It has where that was measured right and no slower than the product and the activation after it: in tables
    of measurements this is ``layer_norm_mlp`` with the options "fused". Inside ``fusing`` that decides.
    """
    if not x.is_cuda:
        return False
    if _fusing:
        return _fusing[-1]
    gpu, named = native_backend.machine_name("cuda"), str(dtype).removeprefix("torch.")
    sizes = {"width": x.shape[-1], "hidden": fc1_weight.shape[0], "rows": x.shape[0] * x.shape[1]}
    return measurements.refusal("layer_norm_mlp", gpu, named, (direction,), "fused", sizes) is None


_fusing: list[bool] = []


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """For benchmarks and tests: every call inside is fused if it can be, or none is."""
    _fusing.append(on)
    try:
        yield
    finally:
        _fusing.pop()


def bits(needs: Sequence[bool]) -> int:
    """``needs`` as the libraries read it: bit i for input i."""
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def statistics_shapes(x: Tensor, rows: int, norm: str, dtype: torch.dtype) -> list[Tensor]:
    """A norm's mean and rstd without data; RMSNorm's mean is empty."""
    of_statistics = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (0 if norm == "rms_norm" else rows, rows)
    return [x.new_empty((size,), dtype=of_statistics) for size in sizes]


def product_shapes(stream: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What LayerScale's gradient needs, without data: the product's rows as wide as the stream [B, N, D]."""
    if layer_scale is None:
        return []
    return [stream.new_empty((stream.shape[0] * stream.shape[1], stream.shape[2]), dtype=dtype)]


def gradient_shapes(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that are needed, without data: contiguous, shaped as the inputs."""
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]
