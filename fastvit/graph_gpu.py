"""A GPU as graphs need it: CUDA's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .graph_calls import Forward, Place, copies
from .graph_trial import outside


class Gpu:
    """CUDA graphs of one pool of memory, captured on a stream of its own, replayed one after the other."""

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, None
        with torch.cuda.device(device):
            # For good: torch keeps a workspace of cuBLAS for each, and graphs write to the second's.
            self._side, self._stream = torch.cuda.Stream(), torch.cuda.Stream()
            self._done = torch.cuda.Event()
        self.renew()

    def renew(self) -> None:
        """Another pool: torch takes none again whose graphs are gone, or where a capture failed."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the caller's stream, after the last turn on any stream: graphs of one pool share memory."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if self._last not in (None, current):
                current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)
                self._last = current

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a side stream, when all streams have waited, as torch has it before a capture."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    def on_trial(self, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
        with self._aside():
            forward(copies(inputs))
            return outside("cuda", forward, inputs)

    def capture(
        self, forward: Forward, places: Sequence[Place], inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        # Alone it leaves its stream current where the capture fails.
        with torch.cuda.stream(self._stream), captured:
            placed = [place.empty() for place in places]
            # Not the places themselves: the model may give its input another shape.
            return graph, placed, forward([place.detach() for place in placed])

    @staticmethod
    def is_capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()
