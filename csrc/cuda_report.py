"""`python csrc/cuda_report.py`: every CUDA kernel compiled for every architecture, with no GPU.

It fails where one does not compile, warns (C7510 too), spills, or has local memory or float64, and where one
of Hopper's own does not multiply by warp groups, or touches memory before the kernel ahead of it has ended.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from libraries import (
    ARCHS,
    HOPPER,
    HOPPER_SOURCES,
    NO_CUTLASS,
    NVCC_STRICT,
    TARGET,
    Cutlass,
    find_cutlass,
    find_nvcc,
    toolkit,
)
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

JOBS = 2
PIPE_WIDTH = 160  # a pipe has none of its own, and eighty columns would break every row
STARTS = re.compile(r"Compiling entry function '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
COMPLAINT = re.compile(r"(?:^|: |ptxas |nvcc )(?:warning|error|fatal)\b|C7510")
COUNTED = re.compile(r"spilled to local memory|Local memory used")
WARP_GROUP_PRODUCT, WAIT = "HGMMA", "ACQBULK"  # the latter is griddepcontrol.wait
GLOBAL_MEMORY = re.compile(r"(LD|ST|RED|ATOM)G?|LDGSTS|UTMA(LD|ST|RED)G|UBLK(CP|RED)")
# An address, a predicate if any, an operation with its modifiers, and operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?(\w+)(\S*)([^;]*);", re.MULTILINE)
# What tells one of CUTLASS's kernels from another in a name of some 2000 letters, which nothing demangles.
CUTLASS_KERNEL = re.compile(
    r"KernelTmaWarpSpecialized(?P<schedule>Pingpong|Cooperative)EEENS\w_IJNS\w_ILi(?P<rows>\d+)E"
    r".*?MMA_64x(?P<columns>\d+)x16_F32(?P<dtype>BF16|F16).*(?P<scheduler>StreamK|Persistent)Scheduler"
)
DOUBLE = re.compile(r"^(?!\s*//).*\.f64\b.*$", re.MULTILINE)


@dataclass
class Kernel:
    """What ptxas said of a kernel; all but registers in bytes, and `spilled` is stores and loads."""

    name: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    local: int = 0


@dataclass(frozen=True)
class Report:
    source: str
    arch: str
    seconds: float
    kernels: list[Kernel]
    faults: list[str]


def nvcc_command(
    source: Path, arch: str, output: Path, torch_include: Path, cutlass: Cutlass | None = None
) -> list[str]:
    """The command that compiles a source for one architecture, with warnings as errors."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fvisibility=hidden,-fPIC"]
    defines = ["-DFASTVIT_BUILD_CUDA", TARGET]
    strict = [*NVCC_STRICT, "-Xptxas", "-v"]
    places = ["-isystem", torch_include, "-o", output, source]
    defines += cutlass.flags if cutlass else ()
    return [find_nvcc() or "nvcc", "-cubin", f"-arch=sm_{arch}", *flags, *defines, *strict, *map(str, places)]


def parse_ptxas(text: str) -> tuple[list[Kernel], list[str]]:
    """The kernels in what `ptxas -v` printed, and a line for each thing that is wrong."""
    kernels, faults = [], []
    for line in text.splitlines():
        if match := STARTS.search(line):
            kernels.append(Kernel(match[1]))
        elif kernels and (match := STACK.search(line)):  # of the kernel, or of a function that it calls
            kernels[-1].local = max(kernels[-1].local, int(match[1]))
            kernels[-1].spilled = max(kernels[-1].spilled, int(match[2]) + int(match[3]))
        elif kernels and (match := USED.search(line)):
            kernels[-1].registers, kernels[-1].shared = int(match[1]), int(match[2] or 0)
        elif COMPLAINT.search(line) and not COUNTED.search(line):
            faults.append(line.strip())
    for kernel in kernels:
        if kernel.spilled or kernel.local:
            faults.append(f"{kernel.name}: {kernel.spilled} bytes spilled, {kernel.local} of local memory")
    return kernels, faults


def wrong_instructions(cubin: Path, kernels: Sequence[Kernel]) -> list[str]:
    """A line for each kernel in whose instructions no warp group multiplies, or memory is touched too early.

    Stream-K's kernels may: they are launched to begin when those before them have ended.
    """
    tool = find_cuobjdump()
    if tool is None:
        return ["no cuobjdump on the PATH, in CUDA_HOME/bin or in triton to read the instructions with"]
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    _, *functions = re.split(r"^\s*Function : ", done.stdout, flags=re.MULTILINE)
    known, faults = {text.split(maxsplit=1)[0]: text for text in functions}, []
    for name in (kernel.name for kernel in kernels):
        text = known.get(name, "")
        if WARP_GROUP_PRODUCT not in text:
            faults.append(f"{name}: no {WARP_GROUP_PRODUCT}")
        elif "StreamK" not in name and (early := touches_early(text)):
            faults.append(f"{name}: {early} may come before {WAIT}")
    return faults


def touches_early(text: str) -> str | None:
    """An instruction on global memory that some way reaches without a wait, or None.

    A product of warp groups is as good as a wait: another warp loaded what it multiplies, after waiting.

    Args:
        text: a kernel's instructions, as cuobjdump prints them.
    """
    steps = INSTRUCTION.findall(text)
    places = {int(address, 16): place for place, (address, *_) in enumerate(steps)}
    reached, left = set(), [0]
    while left:
        place = left.pop()
        if place in reached or place == len(steps):
            continue
        reached.add(place)
        address, predicate, operation, modifiers, operands = steps[place]
        if GLOBAL_MEMORY.fullmatch(operation) or operation == "BRX":  # which jumps to where a register says
            return f"{operation}{modifiers} at 0x{address}"
        if operation in (WARP_GROUP_PRODUCT, WAIT, "EXIT", "RET") and not predicate:
            continue
        if operation in ("BRA", "BSSY", "CALL", "WARPSYNC"):
            left += (places[int(target, 16)] for target in re.findall(r"\b0x[0-9a-f]+", operands))
        if operation != "BRA" or predicate or "," in operands:
            left.append(place + 1)
    return None


def find_cuobjdump() -> str | None:
    triton = find_spec("triton")
    found = map(Path, (triton and triton.submodule_search_locations) or ())
    places = (None, toolkit() / "bin", *(folder / "backends" / "nvidia" / "bin" for folder in found))
    return next(filter(None, (shutil.which("cuobjdump", path=path) for path in places)), None)


def compile_one(source: Path, arch: str, torch_include: Path, cutlass: Cutlass | None = None) -> Report:
    """Compile a source and read what it showed."""
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastvit-cuda-") as folder:
        cubin = Path(folder, "a.cubin")
        command = nvcc_command(source, arch, cubin, torch_include, cutlass)
        command += ["-keep", "-keep-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        kernels, faults = parse_ptxas(done.stdout + done.stderr)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        if found := DOUBLE.findall(ptx):
            faults.append(f"float64 in {len(found)} lines of PTX, as in: {found[-1].strip()}")
        if cutlass and cubin.is_file():
            faults += wrong_instructions(cubin, kernels)
    if not faults and (done.returncode or not kernels):
        faults.append(f"no kernel, and nvcc exited with {done.returncode}")
    return Report(source.name, arch, perf_counter() - start, kernels, faults)


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Each name as C++ writes it, without its parameters, or as it is where nothing can demangle."""
    known, tool = sorted(set(names)), shutil.which("cu++filt") or shutil.which("c++filt") or "cat"
    done = subprocess.run([tool], input="\n".join(known), capture_output=True, text=True, check=True)
    plain = re.sub(r"fastvit::|\(anonymous namespace\)::|\bvoid ", "", done.stdout).splitlines()
    return {name: _tile(name) or text.partition("(")[0] for name, text in zip(known, plain, strict=True)}


def _tile(name: str) -> str | None:
    if (found := CUTLASS_KERNEL.search(name)) is None:
        return None
    schedule = found["schedule"] if found["scheduler"] == "Persistent" else found["scheduler"]
    return f"{found['rows']} x {found['columns']} {schedule.lower()} {found['dtype']}"


def show(reports: Sequence[Report], each: bool) -> None:
    """A row for all instances of a template, by the largest, or a row for each; then the faults."""
    console = Console(highlight=False, markup=False)
    console.width = console.width if console.is_terminal else PIPE_WIDTH
    names = demangled(kernel.name for report in reports for kernel in report.kernels)
    sizes = ("registers", "shared", "spilled", "local")
    table = Table("file", "kernel", "arch", "instances", *sizes, "seconds", box=SIMPLE)
    for report in reports:
        groups = defaultdict(list)
        for kernel in report.kernels:
            groups[names[kernel.name] if each else names[kernel.name].partition("<")[0]].append(kernel)
        for name, group in sorted(groups.items()):
            facts = (len(group), *(max(getattr(kernel, size) for kernel in group) for size in sizes))
            table.add_row(report.source, name, report.arch, *map(str, facts), f"{report.seconds:.1f}")
    console.print(table)
    for report in reports:
        for fault in report.faults:
            line = re.sub(r"_Z\w+", lambda match: names.get(match[0], match[0]), fault)
            console.print(f"FAILED {report.source} sm_{report.arch}: {line}", style="red", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all pass, 1 if one fails, 2 if it cannot be run."""
    parser = argparse.ArgumentParser("python csrc/cuda_report.py", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only for it (may be repeated)")
    parser.add_argument("--each", action="store_true", help="a row for every instance of a template")
    asked = parser.parse_args(arguments)
    sources, torch = sorted(Path(__file__).parent.glob("*.cu")), find_spec("torch")
    if torch is None or find_nvcc() is None:
        print("cuda_report: needs torch's headers, and nvcc on the PATH or in CUDA_HOME/bin", file=sys.stderr)
        return 2
    include = Path(torch.submodule_search_locations[0], "include")
    archs = tuple(asked.arch or ARCHS)
    hopper, cutlass = set(Path(__file__).parent.glob(HOPPER_SOURCES)), find_cutlass(archs)
    calls = [(source, arch, include) for source in sources if source not in hopper for arch in archs]
    if cutlass:
        first, *rest = [(source, HOPPER, include, cutlass) for source in sorted(hopper)]
        calls = [first, *calls, *rest]  # not side by side: some 6 GB each
    elif HOPPER in archs:
        print(f"cuda_report: left out {HOPPER_SOURCES}: {NO_CUTLASS}", file=sys.stderr)
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [pool.submit(compile_one, *call) for call in calls]
        list(track(as_completed(jobs), "compiling", len(jobs), console=Console(stderr=True), transient=True))
    reports = [job.result() for job in jobs]
    show(reports, asked.each)
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
