"""What the ops ask of a GPU: its name and its compute capability, of the one that is there or of one assumed.

``FASTVIT_ARCH=sm_90``, or ``assume_arch("sm_90")``, answers for a GPU that is absent: fake tensors on "cuda"
then resolve as they would there, and the CUDA library is taken to be built for it. Nothing can be computed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """``assumed`` is one that is not here."""

    name: str
    capability: tuple[int, int]
    assumed: bool = False


_ARCH = re.compile(r"sm_(\d+)(\d)a?")


def parse(arch: str) -> Gpu:
    """A GPU of this architecture, "sm_90" say.

    Raises:
        ValueError: for anything else.
    """
    match = _ARCH.fullmatch(arch)
    if match is None:
        raise ValueError(f"arch is {arch!r}; it must be like sm_80, sm_90 or sm_120")
    return Gpu(f"a GPU of {arch.rstrip('a')}", (int(match[1]), int(match[2])), assumed=True)


# A plain list, innermost last, as the backends' stack is.
_assumed: list[Gpu] = []
# A mistake in the environment is raised by the first question, not by the import.
_environment = os.environ.get("FASTVIT_ARCH", "")


@contextmanager
def assume_arch(arch: str | None) -> Iterator[None]:
    """Inside the ``with`` block every GPU is taken for one of this architecture; None changes nothing.

    Raises:
        ValueError: for a name that is none.
    """
    if arch is None:
        yield
        return
    gpu = parse(arch)
    _assumed.append(gpu)
    try:
        yield
    finally:
        _assumed.remove(gpu)


def assumed() -> Gpu | None:
    """The GPU that is taken to be there, if one is.

    Raises:
        ValueError: if FASTVIT_ARCH names none.
    """
    if _assumed:
        return _assumed[-1]
    if not _environment:
        return None
    try:
        return parse(_environment)
    except ValueError as error:
        raise ValueError(f"FASTVIT_ARCH: {error}") from None


def is_assumed() -> bool:
    """Whether one may be: FASTVIT_ARCH may name none."""
    return bool(_assumed or _environment)


def gpu_of(device: torch.device | None = None) -> Gpu:
    """The GPU with this index, or the current one."""
    return assumed() or _present(device)


def is_there() -> bool:
    """Whether torch finds a GPU, or one is assumed; where one is in use, none is looked for."""
    return is_assumed() or torch.cuda.is_initialized() or torch.cuda.is_available()


def _present(device: torch.device | None) -> Gpu:
    if not torch.cuda.is_initialized():
        return _described(device)
    index = None if device is None else device.index
    return _with_index(torch.cuda.current_device() if index is None else index)


def _described(device: torch.device | int | None) -> Gpu:
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.name, (facts.major, facts.minor))


_with_index = cache(_described)


# What torch.compiler.assume_constant_result sets, whose import is the whole compiler's.
for _constant in (assumed, gpu_of):
    _constant._dynamo_marked_constant = True
