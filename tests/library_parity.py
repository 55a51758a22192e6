"""Accelerated models beside their originals: outputs and gradients by the contract, and what ran fused."""

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
    vectors of 64: all gradients are judged together, each in units of torch's own error, and so are the
    outputs. Those that no parameter has a part in are to be the same bits.
    """
    truth, _ = _run(copy.deepcopy(original).double(), _wide(args), _wide(kwargs))
    runs = [_within(context, original, args, kwargs) for _, context in gemm_libraries("cpu")]
    found, constants = _run(ours, args, kwargs)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in truth.items()}
    baselines = [run for run, _ in runs]
    units = {name: _unit(truth[name], [run[name] for run in baselines]) for name in truth}
    gradients = [name for name in truth if name.startswith("grad ")]
    report = Report()
    for group in ([name for name in truth if name not in gradients], gradients):
        worst = max(group, key=lambda name: (found[name].double() - truth[name]).norm() / units[name])
        out, oracle, *others = (_together(values, units, group) for values in (found, truth, *baselines))
        report.rows.append(judge(f"{worst} and others", out, oracle, others, kind="model"))
    report.raise_if_failed()
    assert list(constants) == list(runs[0][1])
    assert all(torch.equal(value, runs[0][1][name]) for name, value in constants.items())


def _unit(truth: Tensor, baselines: list[Tensor]) -> Tensor:
    """The error that torch has here, or where it has none the least that float32 can have."""
    least = truth.square().mean().sqrt() * torch.finfo(torch.float32).eps / 4
    return max([least, *((run.double() - truth).square().mean().sqrt() for run in baselines)])


def _together(values: dict[str, Tensor], units: dict[str, Tensor], names: list[str]) -> Tensor:
    """Side by side, in these units: powers of two, which round nothing."""
    parts = [(values[name] / 2.0 ** units[name].log2().round()).flatten() for name in names]
    return torch.cat(parts).to(values[names[0]].dtype)


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
    # Without a trend from image to image, whose sum would be as exact as the order of its terms is lucky.
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in outputs.values()]
    # A gradient of one number, as a temperature's, is what is left of a cancellation.
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel() > 1}
    found = torch.autograd.grad([*outputs.values()], [*parameters.values()], grads, allow_unused=True)
    gradients: dict[str, list[Tensor]] = {}
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            gradients.setdefault(f"grad {re.sub('[.][qkv]_proj.bias', '.qkv bias', name)}", []).append(
                gradient
            )
    judged = outputs | {name: torch.cat(parts) for name, parts in gradients.items()}
    constants = {name: value for name, value in values.items() if name not in outputs}
    return {name: value.detach() for name, value in judged.items()}, constants
