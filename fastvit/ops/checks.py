"""Checks that the ops share. Each raises one line: the argument, what it is, and what it must be.

They run before every call, so the way through them that raises nothing is kept short.
"""

from torch import Tensor

from ..reference.normalization import NORMS, is_autocast

Expected = tuple[str, Tensor | None, tuple[int, ...]]


def rank(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """ValueError unless the tensor has as many dimensions as ``dims`` names, as in "B, N, D"."""
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must be [{dims}]; its shape is {list(tensor.shape)}")


def floating(op: str, name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor is floating point."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point; it is {tensor.dtype}")


def fit(op: str, name: str, tensor: Tensor, *expected: Expected) -> None:
    """Each other tensor of (name, other, shape), None apart, has that shape and the device and dtype of one.

    Raises:
        ValueError: for a wrong shape or device.
        TypeError: for a wrong dtype, except under autocast, where torch casts.
    """
    device, dtype = tensor.device, tensor.dtype
    for other_name, other, shape in expected:
        if other is None:
            continue
        if other.shape != shape:
            raise ValueError(f"{op}: {other_name} must have shape {list(shape)}; it has {list(other.shape)}")
        if other.device != device:
            raise ValueError(f"{op}: {other_name} is on {other.device}, but {name} is on {device}")
        if other.dtype != dtype and not is_autocast(tensor):
            raise TypeError(f"{op}: {other_name} is {other.dtype}, but {name} is {dtype}")


def device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor | None) -> None:
    """ValueError unless the other is None or lies on the tensor's device."""
    if other is not None and other.device != tensor.device:
        raise ValueError(f"{op}: {other_name} is on {other.device}, but {name} is on {tensor.device}")


def norm(op: str, name: str, norm: str, *biases: tuple[str, Tensor | None]) -> None:
    """ValueError unless the norm is known, and its biases None where it has none."""
    if norm == "layer_norm":
        return
    if norm not in NORMS:
        raise ValueError(f"{op}: {name} is {norm!r}; it must be one of {', '.join(NORMS)}")
    for bias_name, bias in biases:
        if bias is not None:
            raise ValueError(f"{op}: {bias_name} must be None, because {norm} has no bias")


def goes_with(op: str, name: str, tensor: Tensor | None, other_name: str, other: Tensor | None) -> None:
    """ValueError for a tensor that means nothing without the other."""
    if tensor is not None and other is None:
        raise ValueError(f"{op}: {name} is given, but {other_name} is None")
