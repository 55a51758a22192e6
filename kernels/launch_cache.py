"""Launches that are planned and bound once for each kind of call, and repeated with other pointers.

To plan a launch and to have Triton bind its forty arguments takes longer on the CPU than a small kernel takes
on a GPU. Both depend on metadata alone. So the result is kept under everything that they read: the plan and
its options, and for each tensor its shape, strides, dtype, device and address modulo 16, by which Triton
compiles. The next call with the same metadata fills in the addresses and calls the compiled kernel's own
launcher, as Triton itself does. In the interpreter, under Triton's hooks and in its debug mode every call is
planned and bound.
"""

import threading
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .launch import Launch

MOST = 1024  # kinds of call that are kept; the oldest goes first
Plan = Callable[..., Launch | tuple[Launch, ...]]


class Step(NamedTuple):
    """One launch that is bound: who runs the compiled kernel, and with what.

    ``arguments`` are in the kernel's order; ``pointers`` are (place among them, which of the call's tensors,
    bytes behind its first element).
    ``compiled`` is held since it frees what ``function`` names.
    """

    kernel: JITFunction
    compiled: CompiledKernel
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    arguments: list[Any]
    pointers: tuple[tuple[int, int, int], ...]


_prepared: dict[tuple, tuple[int, tuple[Step, ...]]] = {}  # with the device's index
_lock = threading.Lock()
# Part of every key, and another number once plans read other tile tables.
_edition = 0
# Torch's own, whatever a test that watches memory puts in its place.
_empty_strided = torch.empty_strided


def run(plan: Plan, *args: Any) -> None:
    """Run what ``plan(*args)`` plans, on the current stream of the device that the tensors are on.

    Args:
        plan: a function of its arguments' metadata.
        args: tensors, hashable values, and tuples and dicts of both.

    Raises:
        ValueError: if a grid is larger than CUDA takes.
    """
    key, pointers, device = [plan, _edition], [], -1
    for arg in args:
        if isinstance(arg, tuple):
            values = arg
        elif isinstance(arg, dict):
            key += arg
            values = arg.values()
        else:
            values = (arg,)
        for value in values:
            if isinstance(value, Tensor):
                pointers.append(pointer := value.data_ptr())
                # The device too: of a tensor that lies elsewhere Triton is to say that it cannot be read.
                device = value.get_device()
                key += (value.shape, value.stride(), value.dtype, device, pointer % 16)
            else:
                key.append(value)
    key = tuple(key)
    known = _prepared.get(key) if device >= 0 else None
    if known is None or not _repeats(known[1]):
        _plan_and_run(plan, args, key, device)
        return
    device, steps = known
    active = driver.active
    if active.get_current_device() == device:
        _repeat(steps, pointers, active.get_current_stream(device))
    else:
        with torch.cuda.device(device):
            _repeat(steps, pointers, active.get_current_stream(device))


def _repeat(steps: tuple[Step, ...], pointers: list[int], stream: int) -> None:
    for step in steps:
        arguments = step.arguments.copy()
        for place, index, offset in step.pointers:
            arguments[place] = pointers[index] + offset
        step.run(*step.grid, stream, step.function, step.metadata, None, None, None, *arguments)


def _plan_and_run(plan: Plan, args: tuple, key: tuple, device: int) -> None:
    launches = _planned(plan, args)
    compiled = [launch() for launch in launches]
    if device < 0 or not all(isinstance(kernel, CompiledKernel) for kernel in compiled):
        return
    steps = _bound(plan, args, compiled)
    if steps is None:
        return
    with _lock:
        while len(_prepared) >= MOST:
            del _prepared[next(iter(_prepared))]
        _prepared[key] = device, steps


def _planned(plan: Plan, args: tuple) -> tuple[Launch, ...]:
    planned = plan(*args)
    return (planned,) if isinstance(planned, Launch) else planned


def _bound(plan: Plan, args: tuple, compiled: list[CompiledKernel]) -> tuple[Step, ...] | None:
    """The launches of ``compiled`` as steps, or None where a call needs more than other pointers.

    Which pointer is which tensor's tells a plan of tensors that have no data, each with a storage of its own.
    """
    tensors = [value for value in chain.from_iterable(map(_several, args)) if isinstance(value, Tensor)]
    if len({tensor.get_device() for tensor in tensors}) != 1 or knobs.compilation.instrumentation_mode:
        return None
    stand_ins = [_empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    index_of = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(stand_ins)}
    remaining = iter(stand_ins)
    steps = []
    for launch, kernel in zip(_planned(plan, _with_tensors(args, remaining)), compiled, strict=True):
        given = launch.args | launch.constants
        arguments, pointers = [given[name] for name in launch.kernel.arg_names], []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                index = index_of.get(value.untyped_storage()._cdata)
                if index is None:
                    return None  # a copy that the plan makes
                pointers.append((place, index, value.storage_offset() * value.element_size()))
                arguments[place] = None
        grid = (*launch.grid, 1, 1)[:3]
        bound = (kernel.run, grid, kernel.function, kernel.packed_metadata, arguments, tuple(pointers))
        steps.append(Step(launch.kernel, kernel, *bound))
    return tuple(steps)


def _with_tensors(args: tuple, tensors: Any) -> tuple:
    """The arguments with these tensors, in order, in the place of theirs."""
    given = []
    for arg in args:
        values = [next(tensors) if isinstance(value, Tensor) else value for value in _several(arg)]
        if isinstance(arg, dict):
            given.append(dict(zip(arg, values, strict=True)))
        elif isinstance(arg, tuple):
            given.append(arg._make(values) if hasattr(arg, "_make") else tuple(values))
        else:
            given += values
    return tuple(given)


def _several(arg: Any) -> tuple:
    if isinstance(arg, dict):
        return tuple(arg.values())
    return arg if isinstance(arg, tuple) else (arg,)


def _repeats(steps: tuple[Step, ...]) -> bool:
    """Whether nobody is to see the launch or to change how it is compiled: Triton's own path serves them."""
    runtime = knobs.runtime
    return not (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.__dict__.get("instrumentation_mode")
        or any(step.kernel.pre_run_hooks for step in steps)
    )


def forget() -> None:
    """Plan every kind of call anew: the tile tables say something else."""
    global _edition
    with _lock:
        _edition += 1
        _prepared.clear()
