"""One sample of a call on a GPU: what its kernels take, and what it takes when Python makes the call.

A small call's kernels are done long before Python has launched the next ones: of such a call the time between
two events is the host's. So the calls are captured in a CUDA graph, in which their launches lie ready. What
cannot be captured is launched while the GPU sleeps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .timing import Sample

Call = Callable[[], object]
# Written before each sample: larger than any L2.
_FLUSH_BYTES = 256 << 20
# Cycles of a GPU's clock, at most 2 GHz: 0.1 ms for a graph's launch, 0.5 ms for each call that Python makes.
GRAPH_SLEEP, CALL_SLEEP = 200_000, 1_000_000


class Repeated:
    """A call with, if it can be captured, a CUDA graph of ``count`` of them; both run on the current stream.

    Args:
        count: calls of one sample; as many as the call has sets of inputs, so that each is read once after
            the L2 was flushed.
    """

    def __init__(self, call: Call, count: int) -> None:
        self.call, self.count = call, count
        self.graph = self._captured()

    def __call__(self) -> object:
        return self.call()

    def each(self) -> None:
        for _ in range(self.count):
            self.call()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """None if it cannot be, for whatever reason each library has."""
        try:
            with _no_synchronisation():
                self.each()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.each()
            graph.replay()
            torch.cuda.synchronize()
        except Exception:
            return None
        return graph


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Where torch waits for the GPU is an error: a capture that breaks leaves its allocator in disorder."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Work on a stream that can be captured: a backward runs on that of its forward, whoever calls it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_stream(device)):
        yield
    torch.cuda.synchronize(device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: torch keeps a workspace of cuBLAS for each."""
    return torch.cuda.Stream(device)


class GpuSampler:
    """Times calls with a cold L2: a ``Repeated`` as its kernels and as Python's calls, others by events."""

    def __init__(self, device: str | torch.device) -> None:
        self.flush = _flush(device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> Sample:
        if not isinstance(call, Repeated):
            self.flush()
            return Sample(self._between(call), timed="events")
        eager = self._in_eager(call)
        if call.graph is not None:
            return Sample(
                self._queued(call.graph.replay, GRAPH_SLEEP) / call.count, eager, "graph", call.count
            )
        ms = self._queued(call.each, CALL_SLEEP * call.count) / call.count
        return Sample(ms, eager, "wall" if self.ran_dry else "queued", call.count)

    def _queued(self, work: Call, sleep: int) -> float:
        """Launched while the GPU sleeps; if work waits for the GPU, as some do, the queue runs dry."""
        self.flush()
        torch.cuda._sleep(sleep)
        return self._between(work)

    def _in_eager(self, call: Repeated) -> float:
        """Of calls behind one that is not counted: the host's time or the GPU's, whichever is longer.

        That is what a call adds to a chain of calls, as a model is one. With nothing before it the first call
        would count its host's time and its kernels' both; with a queue before it, neither whole.
        """
        self.flush()
        torch.cuda.synchronize()
        call()
        return self._between(call.each) / call.count

    def _between(self, work: Call) -> float:
        self.start.record()
        work()
        self.ran_dry = self.start.query()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def _flush(device: str | torch.device) -> Call:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_
