"""Red zones: memory in which a read out of bounds, a stray write or an element never written shows on a CPU.

Inputs lie between bands of NaN, outputs between canaries, and uninitialised memory is NaN: each of these
faults ends in a NaN where the oracle has none, or in a canary that changed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils import deterministic

# Elements on either side, if the tensor does not span more: a whole tile past its end still lies inside.
_BAND = 4096
_ALIGNMENT = 64


def guarded(tensor: torch.Tensor, *, misalign: int = 0) -> torch.Tensor:
    """A copy of the same shape, strides and requires_grad in the middle of a slab of NaN (ints: a pattern).

    Gaps between strided elements are NaN as well. The copy is aligned as fresh memory is, or off by
    ``misalign`` elements.
    """
    places = _places(tensor)
    copy, slab = _in_slab(tensor, misalign)
    slab[copy.storage_offset() + places] = tensor.detach()
    return copy.requires_grad_(tensor.requires_grad)


class Canaries:
    """Outputs between bands of a bit pattern, itself a NaN, that only a stray write can change."""

    def __init__(self) -> None:
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def empty(
        self, *size: int, dtype: torch.dtype = torch.float32, device: str = "cpu", misalign: int = 0
    ) -> torch.Tensor:
        """A contiguous output, every element the pattern."""
        return self.like(torch.empty(size, dtype=dtype, device=device), misalign=misalign)

    def like(self, template: torch.Tensor, *, misalign: int = 0) -> torch.Tensor:
        """An output in all but its numbers like the template, every element the pattern."""
        output, slab = _in_slab(template, misalign)
        self._outputs.append((output, slab))
        return output.requires_grad_(template.requires_grad)

    def check_bands(self) -> None:
        """Raise ``AssertionError`` if anything was written beside an output."""
        for output, slab in self._outputs:
            beside = _is_poison(slab)
            beside[output.storage_offset() + _places(output)] = True
            strays = (~beside).nonzero().flatten() - output.storage_offset()
            where = f"an output {list(output.shape)}, the first {strays[:1].tolist()} elements from its start"
            assert not len(strays), f"{len(strays)} stray writes beside {where}"

    def check_written(self) -> None:
        """Raise ``AssertionError`` if an element of an output still holds the pattern."""
        for output, slab in self._outputs:
            unwritten = _is_poison(slab)[output.storage_offset() + _places(output)]
            where = unwritten.nonzero()[:1].tolist()
            assert not where, f"{int(unwritten.sum())} elements never written, the first at {where}"


@contextmanager
def poisoned_empty() -> Iterator[Canaries]:
    """Uninitialised memory is NaN (ints: a pattern), and what Python code allocates lies between canaries.

    ``torch.empty``, ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` called in Python, the body of
    a registered op included, give outputs of the ``Canaries`` yielded, whose bands are checked on leaving.
    What compiled code allocates torch fills itself, by its deterministic mode, which is on meanwhile.
    """
    canaries = Canaries()
    mode = torch.get_deterministic_debug_mode()
    filled = deterministic.fill_uninitialized_memory
    with ExitStack() as patches:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patches.enter_context(mock.patch.object(owner, name, _between(canaries, getattr(owner, name))))
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield canaries
        finally:
            torch.set_deterministic_debug_mode(mode)
            deterministic.fill_uninitialized_memory = filled
    canaries.check_bands()


def _between(canaries: Canaries, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_between(*args, **kwargs):
        template = allocate(*args, **kwargs)
        plain = type(template) is torch.Tensor and template.layout == torch.strided and not template.is_meta
        # An empty one can only be given memory of its own, as Triton's interpreter does.
        return canaries.like(template) if plain and template.numel() and "out" not in kwargs else template

    return allocate_between


def _in_slab(template: torch.Tensor, misalign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor with the template's shape and strides in the middle of a poisoned slab, and the slab."""
    places = _places(template)
    span = int(places.max()) + 1 if places.numel() else 0
    band = -(-max(_BAND, span) // _ALIGNMENT) * _ALIGNMENT
    count = (2 * band + span + misalign) * template.element_size()
    pattern = _pattern(template.dtype)
    slab = torch.full((count,), pattern, dtype=torch.uint8, device=template.device).view(template.dtype)
    # set_, unlike as_strided, makes no view: an op may return the tensor, or write to it, as its own.
    fresh = torch.tensor([], dtype=template.dtype, device=template.device)
    return fresh.set_(slab.untyped_storage(), band + misalign, template.shape, template.stride()), slab


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """Where each element lies, in elements from the first [tensor.shape]."""
    places = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size, device=tensor.device) * stride
        places += steps.reshape([-1 if other == dim else 1 for other in range(tensor.dim())])
    return places


def _pattern(dtype: torch.dtype) -> int:
    """The byte to poison with: all ones is a NaN in every float format; a bool has only 0 and 1."""
    return 0xFF if dtype.is_floating_point else 0x01 if dtype == torch.bool else 0xA5


def _is_poison(slab: torch.Tensor) -> torch.Tensor:
    return (slab.view(torch.uint8).reshape(-1, slab.element_size()) == _pattern(slab.dtype)).all(-1)
