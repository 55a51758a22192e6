"""Interleaved timing: every provider runs once a round, so that drifting clocks hit them all alike."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from .gpu_timing import Call, GpuSampler
from .machine import Machine, machine
from .rows import Row, load, save
from .timing import Sample, Timing

__all__ = ["Machine", "Row", "Stopped", "Timing", "load", "machine", "measure", "ratios", "rotating", "save"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C after some rounds, with what those gave."""

    def __init__(self, timings: dict[str, Timing]) -> None:
        self.timings = timings


def measure(
    providers: dict[str, Call],
    *,
    rounds: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.0,
    device: str | torch.device = "cpu",
    sync: Call | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Call | None = None,
    settle: float = 0.0,
    before: Mapping[str, Call] | None = None,
) -> dict[str, Timing]:
    """Time the providers in interleaved rounds: A B C, A B C, ...

    Args:
        providers: calls without arguments, by name; see `rotating` for several input sets.
        rounds: at least so many rounds.
        warmup: rounds that are run first and not kept. Compile before, they are not meant for that.
        min_seconds: go on until the timed calls of all providers add up to this.
        device: on "cuda" each call is timed by events with a cold L2, and a ``Repeated`` one as that says.
        sync: times by `clock` instead, with this call (torch.cuda.synchronize, say) around every sample.
        clock: seconds; a test gives its own.
        on_round: called after each round, warm-up included (a progress bar's tick).
        settle: seconds of rest before each sample, in which the last provider's own threads stop spinning.
        before: by provider what each of its samples needs, untimed.

    Raises:
        Stopped: at Ctrl-C, if a round was over.
    """
    if not providers or rounds < 1 or warmup < 0:
        counts = f"{len(providers)} providers, {rounds} rounds, {warmup} warm-up rounds"
        raise ValueError(f"nothing to measure: {counts}")
    events = torch.device(device).type == "cuda" and sync is None
    sample = GpuSampler(device) if events else _clock_sampler(clock, sync)
    samples: dict[str, list[Sample]] = {name: [] for name in providers}
    spent = 0.0
    try:
        for index in itertools.count(-warmup):
            if index >= rounds and spent >= 1e3 * min_seconds:
                break
            for name, call in providers.items():
                if before and name in before:
                    before[name]()
                time.sleep(settle)
                found = sample(call)
                if index >= 0:
                    samples[name].append(found)
                    spent += found.calls * (found.ms + (found.eager or 0.0))
            if on_round is not None:
                on_round()
    except KeyboardInterrupt:
        if whole := min(map(len, samples.values())):
            raise Stopped(_timings(samples, whole)) from None
        raise
    return _timings(samples)


def _timings(samples: dict[str, list[Sample]], rounds: int | None = None) -> dict[str, Timing]:
    return {name: Timing.of(values[:rounds]) for name, values in samples.items()}


def ratios(timings: dict[str, Timing], baseline: str) -> dict[str, float]:
    """How many times faster than the baseline: the median over rounds of baseline / provider.

    Of those that were timed like the baseline: with the host's share, or without.

    Raises:
        ValueError: the baseline was not measured.
    """
    if baseline not in timings:
        raise ValueError(f"no baseline {baseline!r}; measured were {', '.join(timings)}")
    base = timings[baseline]
    alike = {name: timing for name, timing in timings.items() if timing.is_like(base)}
    pairs = {name: zip(base.samples, timing.samples, strict=True) for name, timing in alike.items()}
    return {name: median(b / s for b, s in both) for name, both in pairs.items()}


def rotating(function: Callable[..., object], inputs: Sequence[object]) -> Call:
    """A call that feeds the inputs in turn, so that what is measured is not the cache."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


def _clock_sampler(clock: Callable[[], float], sync: Call | None) -> Callable[[Call], Sample]:
    def sample(call: Call) -> Sample:
        if sync is not None:
            sync()
        start = clock()
        call()
        if sync is not None:
            sync()
        return Sample(1e3 * (clock() - start))

    return sample
