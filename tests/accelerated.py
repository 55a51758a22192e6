"""Accelerated models beside their originals: the contract on every output and gradient, and what ran fused."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit.contract import Report, gemm_libraries, judge
from fastvit.recording import recording
from fastvit.verification import randomize

BLOCK = ("layer_norm_linear", "attention", "linear_residual", "layer_norm_mlp")


def images(batch: int = 8, size: int | tuple[int, int] = 32, channels: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The model with weights that matter, in evaluation mode, and an accelerated copy."""
    original = randomize(model).eval()
    return original, fastvit.accelerate(copy.deepcopy(original), strict=True, **options)


def named(output: Any, name: str = "out") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output, nested as it may be, by the fields that lead to it."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from named(value, f"{name}.{index}")
    else:
        assert output is None or isinstance(output, (int, float, str)), f"{name} is a {type(output)}"


def events(model: nn.Module, *args, **kwargs) -> list[str]:
    """What a call ran: ops by name, and for modules that ran their own forward the reason."""
    with recording() as recorder, torch.no_grad():
        model(*args, **kwargs)
    return [event.op or event.reason for event in recorder.events]


def reasons(model: nn.Module, *args, **kwargs) -> set[str]:
    """Why modules ran their own forward in a call."""
    ops = {*BLOCK, "patch_embed"}
    return set(events(model, *args, **kwargs)) - ops


def same(ours: Any, theirs: Any) -> None:
    """The same fields in the same order, and the same numbers but for float32's rounding."""
    ours, theirs = list(named(ours)), list(named(theirs))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert theirs
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_parity(original: nn.Module, ours: nn.Module, *args, **kwargs) -> None:
    """Judge ours by the original in float64 and in float32, on every output and every parameter's gradient.

    How two roundings compare is chance where the numbers are few, and most parameters of a small model are
    vectors of 64: a layer's gradients are judged together, each by its own size, and so are the outputs.
    Outputs that no parameter has a part in are to be the same bits.
    """
    truth, _ = _run(copy.deepcopy(original).double(), _wide(args), _wide(kwargs))
    runs = [_within(context, original, args, kwargs) for _, context in gemm_libraries("cpu")]
    found, constants = _run(ours, args, kwargs)
    assert list(found) == list(truth)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in truth.items()}
    report = Report()
    for group in dict.fromkeys(map(_group, truth)):
        names = [name for name in truth if _group(name) == group]
        out, oracle, *baselines = (
            _together(values, truth, names) for values in (found, truth, *(run for run, _ in runs))
        )
        report.rows.append(judge(group, out, oracle, baselines, kind="model"))
    report.raise_if_failed()
    assert list(constants) == list(runs[0][1])
    assert all(torch.equal(value, runs[0][1][name]) for name, value in constants.items())


def _group(name: str) -> str:
    """The layer that it is a gradient of; or "outputs", or the rest of the gradients."""
    layer = re.match(r"grad .*?\.(?:\w+_)?\d+\.", name)
    return layer[0] if layer else "the other gradients" if name.startswith("grad ") else "outputs"


def _together(values: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> Tensor:
    """Side by side, each in units of its true size."""
    sizes = {name: truth[name].square().mean().sqrt() for name in names}
    return torch.cat([(values[name].double() / sizes[name]).flatten() for name in names]).to(
        values[names[0]].dtype
    )


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _wide(inner) for key, inner in value.items()}
    return tuple(map(_wide, value)) if isinstance(value, tuple) else value


def _within(context: Callable, model: nn.Module, args: tuple, kwargs: dict) -> tuple[dict, dict]:
    with context():
        return _run(model, args, kwargs)


def _run(model: nn.Module, args: tuple, kwargs: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name, and the outputs that have none; all others take part in the loss.

    The gradients of the biases of q, k and v are judged as one, as where they are one parameter: by itself
    the keys' is nothing but rounding, since a bias of all keys changes no attention weight.
    """
    values = dict(named(model(*args, **kwargs)))
    outputs = {name: value for name, value in values.items() if value.requires_grad}
    grads = [
        torch.linspace(-1, 1, v.numel(), dtype=torch.float64).view_as(v).to(v.dtype) for v in outputs.values()
    ]
    # A gradient of one number, as a temperature's, is what is left of a cancellation.
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel() > 1}
    found = torch.autograd.grad([*outputs.values()], [*parameters.values()], grads, allow_unused=True)
    gradients: dict[str, list[Tensor]] = {}
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            gradients.setdefault(f"grad {re.sub('[qkv]_proj.bias', 'qkv bias', name)}", []).append(gradient)
    judged = outputs | {name: torch.cat(parts) for name, parts in gradients.items()}
    constants = {name: value for name, value in values.items() if name not in outputs}
    return {name: value.detach() for name, value in judged.items()}, constants
