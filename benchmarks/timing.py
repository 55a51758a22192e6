"""What the harness measured of one provider."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mode
from typing import Literal, NamedTuple, Self

import numpy as np

# How a time was taken. "graph": replays of a CUDA graph; "queued": launches that lay ready before the first
# ran; both are the GPU's time alone. "events": what a GPU needed from a call's begin to its end, the waiting
# for its launches included. "wall": a clock around the call, or launches that did not lie ready.
How = Literal["graph", "queued", "events", "wall"]
GPU_ALONE = ("graph", "queued")


class Sample(NamedTuple):
    """One call's share of a sample in milliseconds, ``eager`` that of calls that Python makes one by one."""

    ms: float
    eager: float | None = None
    timed: How = "wall"
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """The samples in milliseconds, in the order of the rounds; ``eager`` is empty where it is the same."""

    samples: tuple[float, ...]
    eager: tuple[float, ...] = ()
    timed: How = "wall"

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Self:
        samples = list(samples)
        eager = tuple(sample.eager for sample in samples if sample.eager is not None)
        return cls(tuple(sample.ms for sample in samples), eager, mode(sample.timed for sample in samples))

    @property
    def in_eager(self) -> "Timing":
        """What Python's own calls took."""
        return Timing(self.eager, timed="wall") if self.eager else self

    def is_like(self, other: "Timing") -> bool:
        """Whether their ratio says something: the GPU's time alone has no ratio to one with the host's."""
        return (self.timed in GPU_ALONE) == (other.timed in GPU_ALONE)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        return self.quantile(0.5)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)
