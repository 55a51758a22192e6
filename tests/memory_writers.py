"""Writers of weights by their memory, past torch: an address, a storage, another process or rank."""

import ctypes
import mmap
import os

import torch
from process_groups import collective
from torch import Tensor, nn
from torch.utils import dlpack
from writing import Writer, Writes, delta, every, matrices, through


def bytes_of_storage(model: nn.Module) -> Writes:
    """The sign of every seventh number."""
    for _, p in matrices(model):
        storage, size = p.detach().untyped_storage(), p.element_size()
        first = p.storage_offset()
        for i in range(first, first + p.numel(), 7):
            last = (i + 1) * size - 1
            storage[last] = storage[last] ^ 0x80
    yield model


def storage_copied(name: str, p: nn.Parameter) -> None:
    whole = p.untyped_storage().clone()  # of which the parameter may be a part
    torch.empty(0, dtype=p.dtype).set_(whole, p.storage_offset(), p.shape, p.stride()).add_(delta(name, p))
    p.untyped_storage().copy_(whole)


def foreign_memory(model: nn.Module) -> Writes:
    """Parameters in memory that is not torch's, which its owner writes."""
    owners = []
    for name, p in model.named_parameters():
        change = delta(name, p)
        memory = bytearray(p.detach().numpy().tobytes())
        p.data = torch.frombuffer(memory, dtype=p.dtype).view(p.shape)
        owners.append((memory, change))
    yield model
    for memory, change in owners:
        there = torch.frombuffer(memory, dtype=change.dtype).view(change.shape)
        memory[:] = (there + change).numpy().tobytes()
    yield model


def another_process(model: nn.Module) -> Writes:
    """Shared memory, written by a process that knows neither torch's version counters nor this model."""
    model.share_memory()
    yield model
    own = [
        (p.detach().numpy(), (p.detach() + delta(name, p)).numpy()) for name, p in model.named_parameters()
    ]
    child = os.fork()
    if child == 0:
        for array, new in own:
            array[...] = new
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    yield model


def shared_file(model: nn.Module) -> Writes:
    """Parameters in a mapped file, written through another mapping."""
    named = dict(model.named_parameters())
    new = {name: (p.detach() + delta(name, p)).numpy().tobytes() for name, p in named.items()}
    file = os.memfd_create("weights")
    os.ftruncate(file, sum(map(len, new.values())))
    ours, theirs = (mmap.mmap(file, 0) for _ in range(2))
    os.close(file)
    at = 0
    for name, p in named.items():
        ours[at : at + len(new[name])] = p.detach().numpy().tobytes()
        p.data = torch.frombuffer(ours, dtype=p.dtype, count=p.numel(), offset=at).view(p.shape)
        at += len(new[name])
    yield model
    theirs[:] = b"".join(new.values())
    yield model


def moved_in(name: str, p: nn.Parameter) -> None:
    new = (p.detach() + delta(name, p)).contiguous()
    ctypes.memmove(p.data_ptr(), new.data_ptr(), p.numel() * p.element_size())


def poked(p: Tensor, amount: float) -> None:
    """One number, by its address."""
    at = p.data_ptr() + p.element_size() * (p.numel() // 2 + 1)
    value = (ctypes.c_double if p.dtype == torch.float64 else ctypes.c_float).from_address(at)
    value.value += amount


MEMORY: dict[str, Writer] = {
    "NumPy": through(lambda p: p.detach().numpy()),
    "DLPack": through(lambda p: dlpack.from_dlpack(dlpack.to_dlpack(p.detach()))),
    "DLPack of the array standard": through(lambda p: torch.from_dlpack(p.detach())),
    "storage": every(storage_copied),
    "bytes of the storage": bytes_of_storage,
    "foreign memory": foreign_memory,
    "another process": another_process,
    "mapped file": shared_file,
    "memmove": every(moved_in),
    **{name: collective(name, delta) for name in ("broadcast", "all_reduce", "scatter", "recv")},
}
