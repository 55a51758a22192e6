"""`python -m fastvit_kernels.aot`: every shipped configuration compiled ahead of time, with no GPU.

It fails where a kernel does not compile, holds float64, exceeds the shared memory or may overwrite there what
an asynchronous product of other warps still reads, or ptxas says what is not understood; where one in 16 bits
or tf32 spills registers, has a dot without tensor cores or asynchronous products that ptxas serialises; and
where one in exact float32 has a dot with tensor cores.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import triton

from .aot_compile import SHARED_LIMITS, Compiled, examine
from .aot_report import save, show, show_static
from .aot_static import Row, count
from .launch import Launch

PLANS = ("fastvit_kernels.attention_aot", "fastvit_kernels.patch_embed_aot")


class Job(NamedTuple):
    """A launch by its place in its module's plan: it goes to another process, and a kernel cannot."""

    module: str
    arch: str
    index: int
    kernel: str
    label: str


class Unusable(Exception):
    """What was asked for cannot be compiled. The text is one line."""


@cache
def launches(module: str, arch: str) -> list[tuple[str, Launch]]:
    """Everything that a module launches on an architecture.

    Raises:
        Unusable: if that is nothing, which a gate may not take for success.
    """
    planner = getattr(import_module(module), "aot_launches", None)
    if planner is None:
        raise Unusable(f"{module} has no aot_launches")
    planned = list(planner(arch))
    if not planned:
        raise Unusable(f"{module} plans no launch for {arch}")
    return planned


def plan(modules: Sequence[str], archs: Sequence[str], kernels: Sequence[str]) -> Iterator[Job]:
    """The jobs of the kernels whose names contain one of the given ones, of all if there is none."""
    for module in modules:
        for arch in archs:
            for index, (label, launch) in enumerate(launches(module, arch)):
                name = launch.kernel.__name__
                if not kernels or any(part in name for part in kernels):
                    yield Job(module, arch, index, name, label)


def run(job: Job) -> Compiled:
    """Compile one job, in whichever process this is."""
    label, launch = launches(job.module, job.arch)[job.index]
    return examine(launch, label, job.arch)


def run_all(jobs: Sequence[Job], workers: int, done: Callable[[], None] = lambda: None) -> list[Compiled]:
    """Compile the jobs in processes of their own and return what they showed, in their order."""
    rows = _pool(jobs, workers, done)
    # A compiler that crashes takes the pool with it; alone, the one that crashes it is known.
    for job in (job for job in jobs if job not in rows):
        crash = Compiled(job.kernel, job.label, job.arch, faults=("the compiler crashed",))
        rows[job] = _pool([job], 1, done).get(job, crash)
    return [rows[job] for job in jobs]


def _pool(jobs: Sequence[Job], workers: int, done: Callable[[], None]) -> dict[Job, Compiled]:
    rows = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                rows[futures[future]] = future.result()
            except BrokenProcessPool:
                continue
            done()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all pass, 1 if one fails, 2 if it cannot be run as asked."""
    asked = _parser().parse_args(arguments)
    try:
        if triton.knobs.runtime.interpret:
            raise Unusable("TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")
        archs = asked.arch or (["sm_90"] if asked.static else list(SHARED_LIMITS))
        if asked.static and archs != ["sm_90"]:
            raise Unusable("--static knows sm_90 alone")
        names = asked.static or asked.kernel or ()
        jobs = list(plan(asked.module or PLANS, archs, names))
        if not jobs:
            raise Unusable(f"no kernel's name contains {' or '.join(names)}")
    except (Unusable, ImportError) as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    start = perf_counter()
    # Spawned processes inherit the environment. A folder of its own, so that a compile is a compile.
    with tempfile.TemporaryDirectory(prefix="fastvit-aot-") as folder:
        os.environ["TRITON_CACHE_DIR"] = str(asked.cache or folder)
        if asked.static:
            show_static([_count(job) for job in jobs if not job.label.startswith("ieee")], asked.markdown)
            return 0
        rows = _run_with_progress(jobs, asked.jobs)
    seconds = perf_counter() - start
    show(rows, seconds)
    if asked.json:
        save(asked.json, rows, seconds)
    return 1 if any(row.faults for row in rows) else 0


def _count(job: Job) -> Row:
    _, launch = launches(job.module, job.arch)[job.index]
    return count(launch, job.label)


def _run_with_progress(jobs: Sequence[Job], workers: int) -> list[Compiled]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(jobs))
        return run_all(jobs, max(1, min(workers, len(jobs))), lambda: progress.advance(task))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastvit_kernels.aot", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", action="append", choices=list(SHARED_LIMITS), help="compile for it only (may be repeated)")
    add("--kernel", action="append", metavar="NAME", help="kernels whose names contain it (may be repeated)")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--cache", type=Path, metavar="DIR", help="keep what is compiled there: a second run is quick")
    add(
        "--static", action="append", metavar="NAME", help="count these kernels' machine code, and model times"
    )
    add("--markdown", action="store_true", help="with --static: print Markdown")
    add("--module", action="append", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
