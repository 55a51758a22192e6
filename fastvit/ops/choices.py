"""Which of its forms a compiled op takes for a call: fused, folded, with moments, by the tables."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import measurements, native_backend
from ..call_facts import tf32


class How(NamedTuple):
    """What an op decides of a forward call, by metadata, torch's settings and the tables alone.

    ``dtype``: of its products. ``as_they_lie``: its weights are read where they lie, with neither a copy nor
    a cast. The others are what ``folds``, ``fuses``, ``gives_moments`` and ``allows_tf32`` say of the call.
    """

    dtype: torch.dtype
    as_they_lie: bool
    tf32: bool
    folds: bool = False
    fuses: bool = False
    with_moments: bool = False


def is_told() -> bool:
    """Inside ``fusing``, ``folding`` or ``giving_moments``, which answer in the place of the tables."""
    return any(_decided.values())


def allows_tf32(x: Tensor) -> bool:
    """Whether the op's float32 products may be tf32, which is torch's setting for its own."""
    return x.is_cuda and tf32("linear")


def fuses(x: Tensor, fc1_weight: Tensor, dtype: torch.dtype, direction: str) -> bool:
    """Whether fc1's product has the activation in its epilogue, if the library has a kernel for the call.

    It has where that was measured right and no slower than the product and the activation after it: in tables
    of measurements this is ``layer_norm_mlp`` with the options "fused". Inside ``fusing`` that decides.
    """
    return x.is_cuda and _is_chosen("fused", "layer_norm_mlp", x, len(fc1_weight), dtype, direction)


def folds(op: str, x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the op's norm is folded into the product after it, likewise: "folded", and ``folding``.

    Rows enter the product as they are, so that they must be in its dtype. Their mean is taken off sums in
    float32: where it is hundreds of times their deviation (float16), or a row is one large number, the
    result is less exact than the contract asks. No shape tells: a caller is to allow it, and a table.
    """
    if not x.is_cuda or x.dtype != dtype or dtype not in (torch.float16, torch.bfloat16):
        return False
    return _is_chosen("folded", op, x, sum(map(len, weights)), dtype, "fwd")


def gives_moments(op: str, stream: Tensor, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the op's last product, of ``inputs`` channels, leaves the moments of the tokens: "moments".

    The norm after it then reads those in the place of the tokens. On a CPU, and on a GPU without a kernel
    for it, they take a pass of their own, and nothing is gained; there it is inside ``giving_moments`` alone.
    """
    if not _decided["moments"] and not stream.is_cuda:
        return False
    return _is_chosen("moments", op, stream, inputs, dtype, "fwd")


def _is_chosen(form: str, op: str, x: Tensor, inside: int, dtype: torch.dtype, direction: str) -> bool:
    if _decided[form]:
        return _decided[form][-1]
    gpu, named = native_backend.machine_name("cuda"), str(dtype).removeprefix("torch.")
    inner = {"layer_norm_mlp": "hidden", "linear_residual": "in"}.get(op, "out")
    sizes = {"width": x.shape[-1], inner: inside, "rows": x.shape[0] * x.shape[1]}
    return measurements.refusal(op, gpu, named, (direction,), form, sizes) is None


_decided: dict[str, list[bool]] = {"fused": [], "folded": [], "moments": []}


@contextmanager
def _deciding(form: str, on: bool) -> Iterator[None]:
    _decided[form].append(on)
    try:
        yield
    finally:
        _decided[form].pop()


def fusing(on: bool) -> AbstractContextManager[None]:
    """For benchmarks and tests: every call inside is fused if it can be, or none is."""
    return _deciding("fused", on)


def folding(on: bool) -> AbstractContextManager[None]:
    """The same of folded norms."""
    return _deciding("folded", on)


def giving_moments(on: bool) -> AbstractContextManager[None]:
    """The same of moments."""
    return _deciding("moments", on)
