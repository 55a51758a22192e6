"""Checks that the ops share. Each raises one line: the argument, what it is, and what it must be."""

import torch
from torch import Tensor

from ..reference.normalization import NORMS


def rank(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """ValueError unless the tensor has as many dimensions as ``dims`` names, as in "B N D"."""
    if tensor.ndim != len(dims.split()):
        expected = ", ".join(dims.split())
        raise ValueError(f"{op}: {name} must be [{expected}]; its shape is {list(tensor.shape)}")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """ValueError unless the tensor is None or has exactly this shape."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {list(expected)}; it has {list(tensor.shape)}")


def floating(op: str, name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor is floating point."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point; it is {tensor.dtype}")


def like(op: str, name: str, tensor: Tensor, others: dict[str, Tensor | None]) -> None:
    """ValueError unless the others lie on the tensor's device; TypeError unless they share its dtype.

    Under autocast the dtypes may differ: torch casts them.
    """
    device(op, name, tensor, others)
    if torch.is_autocast_enabled(tensor.device.type):
        return
    for other_name, other in others.items():
        if other is not None and other.dtype != tensor.dtype:
            raise TypeError(f"{op}: {other_name} is {other.dtype}, but {name} is {tensor.dtype}")


def device(op: str, name: str, tensor: Tensor, others: dict[str, Tensor | None]) -> None:
    """ValueError unless the others lie on the tensor's device."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{op}: {other_name} is on {other.device}, but {name} is on {tensor.device}")


def norm(op: str, name: str, norm: str, biases: dict[str, Tensor | None]) -> None:
    """ValueError unless the norm is known, and its biases None where it has none."""
    if norm not in NORMS:
        raise ValueError(f"{op}: {name} is {norm!r}; it must be one of {', '.join(NORMS)}")
    for bias_name, bias in biases.items():
        if norm == "rms_norm" and bias is not None:
            raise ValueError(f"{op}: {bias_name} must be None, because rms_norm has no bias")


def goes_with(op: str, name: str, tensor: Tensor | None, other_name: str, other: Tensor | None) -> None:
    """ValueError for a tensor that means nothing without the other."""
    if tensor is not None and other is None:
        raise ValueError(f"{op}: {name} is given, but {other_name} is None")
