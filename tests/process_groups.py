"""Collectives that write parameters, between two ranks of gloo that are two threads of this process.

Calls go through torch's dispatcher, as those of torch.distributed do: they write where the parameters lie,
and raise no version.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn

GLOO = dist.ProcessGroup.BackendType.GLOO


@cache
def _ranks() -> list[dist.ProcessGroup]:
    store, groups = dist.HashStore(), [None, None]

    def join(rank: int) -> None:
        group = dist.ProcessGroup(store, rank, 2)
        group._set_default_backend(GLOO)
        backend = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), GLOO, backend)
        groups[rank] = group

    _together(join)
    return groups


def _together(part: Callable[[int], None]) -> None:
    """Rank 0's part here, rank 1's in another thread."""
    other = Thread(target=part, args=(1,))
    other.start()
    part(0)
    other.join()


def _broadcast(group, tensor):
    options = dist.BroadcastOptions()
    options.rootRank = 1
    return group.broadcast([tensor], options)


def _scatter(group, tensor):
    options = dist.ScatterOptions()
    options.rootRank = 1
    return group.scatter([tensor], [[tensor, tensor.clone()]][: group.rank()], options)


CALLS = {
    "broadcast": _broadcast,
    "all_reduce": lambda group, tensor: group.allreduce([tensor]),
    "scatter": _scatter,
    "recv": lambda group, tensor: (group.send, group.recv)[group.rank() == 0]([tensor], 1 - group.rank(), 0),
}


def collective(name: str, delta: Callable[[str, Tensor], Tensor]) -> Callable[[nn.Module], Iterator]:
    """A writer: what rank 1 holds comes into the parameters of rank 0, the model here."""

    def write(model: nn.Module) -> Iterator[nn.Module]:
        for _ in range(2):
            ours = [p.detach() for p in model.parameters()]
            changes = [delta(n, p) for n, p in model.named_parameters()]
            theirs = [c if name == "all_reduce" else p + c for p, c in zip(ours, changes, strict=True)]

            def run(rank: int, ranks=(ours, theirs)) -> None:
                for tensor in ranks[rank]:
                    CALLS[name](_ranks()[rank], tensor).wait()

            _ranks()
            _together(run)
            yield model

    return write
