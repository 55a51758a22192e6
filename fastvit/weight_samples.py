"""A few elements of each row of some weights, by which a copy of them sees that somebody wrote them.

Many write weights past everything that torch records: `.data`, collectives, NumPy, another process. What they
write is mostly every row, so one element a row tells (of a vector each one). To look takes microseconds: the
compiled libraries do it, beside torch's dispatcher, so that no mode and no tracer sees it.
"""

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import extension


class _Weight(ctypes.Structure):
    """csrc/weight_samples.h has the same; strides and size are in bytes."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride", "size")
    ]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Weight":
        """Of a vector, a matrix, or anything contiguous as a matrix of as many rows."""
        shape, strides, size = tensor.shape, tensor.stride(), tensor.element_size()
        rows = shape[0] if shape else 1
        columns = tensor.numel() // rows if rows else 1
        row_stride = strides[0] * size if shape else 0
        column_stride = (strides[1] if len(shape) == 2 else 1) * size
        return cls(tensor.data_ptr(), rows, columns, row_stride, column_stride, size)


def can_sample(tensors: Sequence[Tensor]) -> bool:
    """Whether a sample can be taken: there is a library for their device, and they lie in rows, in memory."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or extension.why_no_ops(device) is not None:
        return False
    return all(t.numel() and t.data_ptr() and (t.ndim <= 2 or t.is_contiguous()) for t in tensors)


class Sample:
    """Elements of these weights as they were. Their memory must be there whenever it is asked.

    On a GPU nothing waits: asked whether they differ it answers for the looks before, and begins another.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        self._weights = (_Weight * len(tensors))(*map(_Weight.of, tensors))
        places = sum(weight.rows for weight in self._weights)
        self._sample = torch.empty(places, dtype=torch.int64, device=self._device)
        self._on_gpu = _is_on_gpu(self._device)
        if self._on_gpu:
            self._seen = _flags.pop() if _flags else torch.zeros(1, dtype=torch.int32).pin_memory()
            self._differs = self._seen.numpy()
            weakref.finalize(self, _flags.append, self._seen).atexit = False
        self.take()

    def take(self) -> None:
        """Take it anew, in the memory where it was: a captured graph may read it."""
        if not self._on_gpu:
            _library("cpu").fastvit_take_sample(self._weights, len(self._weights), self._sample.data_ptr())
            return
        self._look(None)
        self._differs[0] = 0

    def differs(self, look: bool = True) -> bool:
        """Whether an element is another now; on a GPU whether one was at an earlier look, and one begins."""
        if not self._on_gpu:
            given = self._weights, len(self._weights), self._sample.data_ptr()
            return bool(_library("cpu").fastvit_sample_differs(*given))
        if look:
            self._look(self._seen.data_ptr())
        return bool(self._differs[0])

    def _look(self, seen: int | None) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            given = self._weights, len(self._weights), self._sample.data_ptr(), seen, stream
            if status := _library("cuda").fastvit_sample_on_device(*given):
                raise RuntimeError(
                    f"fastvit: a look at weights on {self._device} failed: CUDA error {status}"
                )


# Of samples that are gone, for those to come. They are never freed: a look that is still under way would
# write to memory that is somebody else's by then. Here it has a copy derived once more, which does no harm.
_flags: list[Tensor] = []


def _is_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _library(device: str) -> ctypes.CDLL:
    """The functions of csrc/weight_samples_cpu.cpp or weight_samples_cuda.cu."""
    library = ctypes.CDLL(str(extension.FOLDER / f"_fastvit_{device}.so"))
    weights, count, pointer = ctypes.POINTER(_Weight), ctypes.c_int64, ctypes.c_void_p
    if device == "cuda":
        library.fastvit_sample_on_device.argtypes = weights, count, pointer, pointer, pointer
        return library
    for function in (library.fastvit_take_sample, library.fastvit_sample_differs):
        function.argtypes = weights, count, pointer
    library.fastvit_take_sample.restype = None
    return library
