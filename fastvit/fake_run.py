"""A model's forward on tensors without data, on a device that need not be here."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def run_without_data(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], device: str | None, gradients: bool
) -> None:
    """Run everything that the model runs in Python: shapes, dtypes and choices of backends are as always.

    Args:
        model: left as it is; weights and inputs may be on the meta device.
        args, kwargs: of its forward.
        device: where weights and inputs are taken to be; None for where they are.
        gradients: record them.

    Raises:
        ValueError: for a model whose forward asks what values a tensor has.
    """
    from torch._subclasses import fake_tensor  # with a compiler behind it

    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    given = {**dict(model.named_parameters()), **dict(model.named_buffers()), **kwargs}
    given |= {f"argument {i}": value for i, value in enumerate(args)}
    fakes = {name: _fake(value, mode, device, gradients) for name, value in given.items()}
    inputs = tuple(fakes.pop(f"argument {i}") for i in range(len(args)))
    named = {name: fakes.pop(name) for name in kwargs}
    try:
        with mode, torch.set_grad_enabled(gradients):
            functional_call(model, fakes, inputs, named)
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        message = "depends on the values of its inputs, which a run without data lacks: pass a part of it"
        raise ValueError(f"{type(model).__name__} {message}") from error


def _fake(value: Any, mode: Any, device: str | None, gradients: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        place = device or value.device
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=place)
        return fake.requires_grad_(gradients and value.requires_grad)


def count_flops(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one forward pass by the names of modules, behind the model's class, and of all as "Global"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # with a compiler behind it

    # Attention as products: of a CPU's fused one, and of nn.MultiheadAttention's, the counter knows nothing.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run_without_data(model, args, kwargs, None, gradients=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
