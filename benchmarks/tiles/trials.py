"""Tiles tried on the GPU at hand: compiled beside one another, judged by the contract, timed in turn."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from statistics import geometric_mean

import torch

from fastvit_kernels.launch import Launch
from fastvit_kernels.tiles import overriding

from ..harness import machine
from ..op_bench import Inputs, Provider, Results, run_case
from .calls import TileCall
from .neighbours import Entry

CURRENT = "current"
CRASHED = "the compiler crashed"
COMPILE_SECONDS = 60
SLOWEST = 0.98  # of the current tile's speed, on any single call
AOT = {"attention": "fastvit_kernels.attention_aot", "patch_embed": "fastvit_kernels.patch_embed_aot"}


class Trials:
    """What the tuner asks of a GPU. Its processes compile, which makes this one find what they compiled."""

    def __init__(
        self, arch: str, device: torch.device, workers: int, alive: Callable[[], None] = lambda: None
    ) -> None:
        self.alive = alive  # told of each answer, as a watchdog may wait for it
        self.arch, self.device, self.workers, self.here = arch, device, workers, machine()
        self.pool: ProcessPoolExecutor | None = None

    def compile(
        self, kernel: str, index: int, entries: Sequence[Entry], calls: Sequence[TileCall]
    ) -> list[str]:
        """For each entry what is wrong with its launches of these calls, or ""."""
        return self._each([(planned_calls, self.arch, kernel, index, entry, calls) for entry in entries])

    def ships(self, kernel: str, index: int, entry: Entry) -> str:
        """What `make aot` would say of the table with this entry, or ""."""
        module = next(AOT[op] for op in AOT if kernel.startswith(op))
        (said,) = self._each([(planned_aot, self.arch, kernel, index, entry, module)])
        return said

    def speeds(
        self, kernel: str, index: int, entries: Sequence[Entry], calls: Sequence[TileCall], rounds: int = 15
    ) -> list[float | None]:
        """Each entry's speed as a multiple of the first's; None for one that is wrong, or slow in a call."""
        found: list[list[float]] = [[] for _ in entries]
        for call in calls:
            providers = {
                CURRENT if i == 0 else str(i): self._provider(kernel, index, entry)
                for i, entry in enumerate(entries)
            }
            outcome = run_case(call, providers, self.device, self.here, rounds=rounds, seconds=0.05)
            self.alive()
            for name, speeds in zip(providers, found, strict=True):
                speeds.append(outcome.speedups.get(name, 0.0))
        return [geometric_mean(speeds) if min(speeds) >= SLOWEST else None for speeds in found]

    def _provider(self, kernel: str, index: int, entry: Entry) -> Provider:
        def prepare(case: TileCall, inputs: Inputs) -> Callable[[], Results]:
            with overriding(kernel, self.arch, index, entry):
                launches, results = case.plan(inputs, self.arch)

            def run() -> Results:
                for launch in launches:
                    launch()
                return results

            return run

        return prepare

    def _each(self, jobs: list[tuple]) -> list[str]:
        """The jobs' answers. A compiler that crashes takes those beside it along: each is then run alone."""
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        answers = [self._answer(future) for future in [self.pool.submit(faults, *job) for job in jobs]]
        if CRASHED in answers:
            self.pool = None
            for i, job in enumerate(jobs):
                if answers[i] == CRASHED:
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                        answers[i] = self._answer(alone.submit(faults, *job))
        return answers

    def _answer(self, future: Future) -> str:
        self.alive()
        try:
            return future.result(COMPILE_SECONDS)
        except BrokenProcessPool:
            return CRASHED
        except TimeoutError:
            return f"it does not compile in {COMPILE_SECONDS} s"


def faults(plan: Callable, arch: str, kernel: str, index: int, entry: Entry, given: object) -> str:
    """In a process of its own: compile what the entry changes of a plan, as its first launch would."""
    from fastvit_kernels.aot_compile import examine  # triton, which needs no GPU for it

    # An entry may change how many launches there are, too.
    before = [(label, _shape(launch)) for label, launch in plan(arch, given)]
    with overriding(kernel, arch, index, entry):
        for label, launch in plan(arch, given):
            known = (label, _shape(launch)) in before
            if not known and (said := examine(launch, label, arch).faults):
                return f"{label}: {said[0]}"
    return ""


def planned_calls(arch: str, calls: Sequence[TileCall]) -> Iterator[tuple[str, Launch]]:
    """The launches of calls, labelled by their dtype's class as the compiler's report wants it."""
    for call in calls:
        dtype = call.dtype_class
        for launch in call.plan(call.without_data(), arch)[0]:
            yield f"{dtype} {call.title}", launch


def planned_aot(arch: str, module: str) -> Iterator[tuple[str, Launch]]:
    """Everything that is compiled ahead of time for the op."""
    return importlib.import_module(module).aot_launches(arch)


def _shape(launch: Launch) -> tuple:
    return launch.constants, launch.num_warps, launch.num_stages
