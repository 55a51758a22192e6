"""A launch as a value, planned from shapes alone: what is compiled ahead of time is what a call runs."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Launch:
    """One kernel with everything it is launched with.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: programs in x (up to 2^31 - 1), y and z (up to 65535).
        args: run-time arguments by name: tensors, ints, floats, or None for a pointer that is not read.
        constants: compile-time arguments by name. One that is named EARLY says whether the kernel may begin
            while the one before it ends.
        num_warps, num_stages: of a program, and of its software pipeline.
    """

    kernel: Callable
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What it is compiled with beside its arguments."""
        early = self.constants.get("EARLY", False)
        pipeline = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return pipeline | {"enable_fp_fusion": True, "launch_pdl": early}

    def __call__(self) -> Any:
        """Run it on the current stream of the device that its tensors are on; an empty grid runs nothing.

        Returns what Triton gives for it: the compiled kernel, or None from its interpreter.

        Raises:
            ValueError: if the grid is larger than CUDA takes.
        """
        check_grid(self.grid)
        if 0 in self.grid:
            return None
        with device_guard(next(a for a in self.args.values() if isinstance(a, Tensor))):
            return self.kernel[self.grid](**self.args, **self.constants, **self.options)


def begins_early(arch: str) -> bool:
    """Whether kernels along a block begin while those before them end: with FASTVIT_PDL=1, from Hopper on.

    CUDA calls it programmatic dependent launch. It is off, because no GPU has shown what it gains.
    """
    return os.environ.get("FASTVIT_PDL") == "1" and arch.startswith("sm_") and int(arch[3:]) >= 90


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current one, whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_grid(grid: tuple[int, ...]) -> None:
    """ValueError for more programs than CUDA takes: 2^31 - 1 in x, 65535 in y and z."""
    limits = (INT32_MAX, 65535, 65535)
    for axis, size, limit in zip("xyz", grid, limits, strict=False):
        if size > limit:
            raise ValueError(
                f"the launch needs {size} programs in {axis}, and CUDA takes {limit}; split the batch"
            )


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element of one of them lies 2^31 or more elements behind its first. Reads metadata only."""
    return any(_span(tensor) > INT32_MAX for tensor in tensors if tensor is not None)


def _span(tensor: Tensor) -> int:
    return sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def vector_width(*tensors: Tensor | None) -> int:
    """The widest of 8, 4, 2 and 1 elements that every stride but the innermost is a multiple of.

    Triton reads as many elements at once as it is told that rows are aligned to.
    """
    strides = [stride for tensor in tensors if tensor is not None for stride in tensor.stride()[:-1]]
    return next(width for width in (8, 4, 2, 1) if all(stride % width == 0 for stride in strides))


def arch_of(device: torch.device) -> str:
    """ "sm_90" and the like of a CUDA device; "cpu" for any other, where the interpreter runs."""
    return f"sm_{''.join(map(str, _capability(device)))}" if device.type == "cuda" else "cpu"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
