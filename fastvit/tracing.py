"""What a model computes, by name: the outputs of its blocks, its own, and its parameters' gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .accelerate.example import Inputs, as_call


def trace(model: nn.Module, x: Inputs, blocks: Sequence[str], backward: bool) -> dict[str, Tensor]:
    """Outputs by the name of what made them, and gradients by the parameter's name, in evaluation mode."""
    args, kwargs = as_call(x)
    with torch.set_grad_enabled(backward), _evaluating(model), _recorded(model, blocks) as values:
        outputs = dict(_named("output", model(*args, **kwargs)))
        values.update(outputs)
    if backward:
        values.update(_gradients(model, [t for t in outputs.values() if t.requires_grad]))
    return {name: value.detach() for name, value in values.items()}


def in_float64(x: Inputs) -> Inputs:
    """The same input with every floating tensor in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return {name: in_float64(value) if isinstance(value, Tensor) else value for name, value in x.items()}


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of an output, which may be nested, by name: "output.logits", say."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for key, part in enumerate(value):
            yield from _named(f"{name}.{key}", part)


def _gradients(model: nn.Module, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = []
    for output in outputs:
        # Not all ones: a gradient whose rows all agree hides a transposition.
        weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64, device=output.device)
        grads.append(weights.view(output.shape).to(output.dtype))
    found = torch.autograd.grad(outputs, list(parameters.values()), grads, allow_unused=True)
    # A gradient that was lost is zero, and is judged: left out, it would go unseen.
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        yield f"grad {name}", torch.zeros_like(parameter) if gradient is None else gradient


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _recorded(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    values: dict[str, Tensor] = {}

    def record(name: str, value: Any) -> None:
        values[name] = value if isinstance(value, Tensor) else value[0]

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        record("embed", args[0] if args else next(iter(kwargs.values())))

    modules = [(name, model.get_submodule(name)) for name in blocks]
    handles = [
        module.register_forward_hook(lambda _module, _args, out, name=name: record(name, out))
        for name, module in modules
    ]
    for _, first in modules[:1]:
        handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
