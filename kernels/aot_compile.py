"""One launch compiled without a GPU, as its first call on that architecture would compile it, and judged."""

import re
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from .aot_ptxas import Said, listen
from .aot_races import races
from .aot_sass import count_products, disassemble
from .launch import Launch

# Bytes of shared memory that a program may have. The safe table serves every architecture without one of its
# own, so it is compiled for the oldest and held to the smallest.
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "safe": 101376,
}
TENSOR_MEMORY_LIMIT = 512
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
DOUBLE = re.compile(r"\.f64\b")
WGMMA = re.compile(r"\bwgmma\.mma_async\b")
CLASSES = ("half", "tf32", "ieee")


@dataclass(frozen=True)
class Compiled:
    """What a compile showed. A kernel that does not compile has its fault and zeros.

    Attributes:
        label: the launch's, whose first word is the dtype class: "half d=64 N=197".
        registers: of a thread.
        shared, shared_limit: bytes of a program, and how many the architecture has.
        spilled: bytes of a thread's stack.
        mma: tensor-core instructions in the PTX.
        hgmma, waits: asynchronous products in the machine code of sm_90, and waits for them.
        faults: why it may not ship.
    """

    kernel: str
    label: str
    arch: str
    registers: int = 0
    shared: int = 0
    shared_limit: int = 0
    spilled: int = 0
    mma: int = 0
    hgmma: int = 0
    waits: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """FAILED, ok, or reported: the cost of exact float32 arithmetic is shown and not judged."""
        return "FAILED" if self.faults else "reported" if self.label.startswith("ieee") else "ok"


def examine(launch: Launch, label: str, arch: str) -> Compiled:
    """Compile one launch for an architecture, or for "safe", and look at what came out."""
    kernel, start = launch.kernel.__name__, perf_counter()
    try:
        compiled, said = compile_launch(launch, 80 if arch == "safe" else int(arch.removeprefix("sm_")))
    # Whatever a compiler raises is the finding.
    except Exception as error:
        return Compiled(kernel, label, arch, faults=(f"does not compile: {_gist(error)}",))
    seconds = perf_counter() - start
    ptx, shared, limit = compiled.asm["ptx"], compiled.metadata.shared, SHARED_LIMITS[arch]
    mma = len(TENSOR_CORES.findall(ptx))
    hgmma, waits = count_products(disassemble(compiled)) if WGMMA.search(ptx) else (0, 0)
    faults = tuple(_faults(compiled, said, label, limit, mma, launch.num_warps))
    return Compiled(
        kernel, label, arch, said.registers, shared, limit, said.spilled, mma, hgmma, waits, seconds, faults
    )


def compile_launch(launch: Launch, capability: int) -> tuple[CompiledKernel, Said]:
    """Compile for one compute capability (90, say), from arguments that may lie on the meta device.

    Returns the kernel, and what ptxas said of it.
    """
    target = GPUTarget("cuda", capability, 32)
    source, options = specialized(launch, target)
    return listen(source, target, options)


def specialized(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What is compiled for a launch, and the options.

    The types and what is known of their values come from Triton's own binder, which a launch goes through.
    """
    backend = make_backend(target)
    given = launch.args | launch.constants | launch.options
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(**given)
    options, *types = launch.kernel._pack_args(backend, given, bound, specialization, options)
    return ASTSource(launch.kernel, *types), options.__dict__


def _faults(compiled: CompiledKernel, said: Said, label: str, limit: int, mma: int, warps: int):
    dtype_class = label.partition(" ")[0]
    if dtype_class not in CLASSES:
        yield f"its label begins with {dtype_class!r} and not with one of {', '.join(CLASSES)}"
    if doubles := len(DOUBLE.findall(compiled.asm["ptx"])):
        yield f"float64 leaked in: .f64 {doubles} times in the PTX"
    if compiled.metadata.shared > limit:
        yield f"shared memory: {compiled.metadata.shared} bytes of {limit}"
    if (columns := getattr(compiled.metadata, "tmem_size", 0)) > TENSOR_MEMORY_LIMIT:
        yield f"tensor memory: {columns} columns of {TENSOR_MEMORY_LIMIT}"
    yield from (f"ptxas says what is not understood: {line}" for line in said.strange)
    if found := races(compiled.asm["ptx"], warps):
        yield f"race: {found[0]}" + f", and {len(found) - 1} more" * (len(found) > 1)
    if dtype_class == "ieee":
        # Triton 3.6 does so on sm_100 to a dot of what was uint8 in memory, whatever precision it asks for.
        if mma:
            yield f"not exact: {mma} tensor-core instructions, which round float32 to tf32"
    else:
        if said.spilled:
            yield f"spills: {said.spilled} bytes a thread"
        yield from (f"serialised: {line}" for line in said.serialized)
        if not mma and "tt.dot" in compiled.asm["ttir"]:
            yield "no tensor-core instruction, though it has a dot"


def _gist(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ptxas says what it refused first; Triton says last what is wrong at the line that it quotes.
    said = next((line for line in lines if "error" in line and ":" in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {said}"
