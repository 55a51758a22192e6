"""A GPU that is absent: Triton's kernels are compiled for an H100, and launching them does nothing."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class NoGpu:
    """In the place of Triton's driver: an H100 on which kernels are loaded and launched, and do nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: deque[tuple] = deque(maxlen=8)
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            unload_module=lambda _: None,
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *given: self.launches.append(given)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def no_gpu(driver: NoGpu | None = None) -> Iterator[NoGpu]:
    """Inside, tensors of the CPU are launched on as if they were on GPU 0, with kernels that do nothing."""
    from triton.runtime.driver import driver as triton_driver

    from fastvit import triton_backend
    from fastvit_kernels import attention, launch, patch_embed

    driver, before = driver or NoGpu(), triton_driver._active
    with ExitStack() as stack:
        stack.callback(setattr, triton_driver, "_active", before)
        triton_driver.set_active(driver)
        # As in the interpreter tensors on the CPU are served; as much is asked of them as on a GPU.
        changes = [(triton_backend, "INTERPRETED", True), (Tensor, "get_device", lambda _: 0)]
        changes += [(module, "arch_of", lambda _: "sm_90") for module in (launch, attention, patch_embed)]
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield driver
