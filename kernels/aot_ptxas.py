"""What ptxas said while it assembled a kernel: the messages that Triton itself throws away."""

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

NOTE = re.compile(r"^ptxas(?:-blackwell)? info +: ")  # Triton has a second ptxas, for sm_100 and later
COMPILING = re.compile(r"Compiling entry function '([^']+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:, .*)?")
STACK = re.compile(r"(\d+) bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads")
# Why asynchronous products (wgmma) run one after the other, or are waited for. C7519 alone is harmless: ptxas
# adds the fence that lets a product take its operand from registers, one instruction.
SERIALIZED = re.compile(r"\(C75(?!19)\d\d\) .*")
# Said of kernels that are in order.
ROUTINE = re.compile(
    r"\d+ bytes gmem(?:, .*)?|Function properties for \S+|Compile time = [\d.]+ ms"
    r"|\(C7519\) warpgroup\.arrive is injected .*"
)


@dataclass(frozen=True)
class Said:
    """ptxas's messages of one kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack, which is where registers are spilled to.
        serialized: why its asynchronous products are not, in ptxas's words.
        strange: lines that are not known: a warning, or the words of another ptxas.
    """

    registers: int
    spilled: int
    serialized: tuple[str, ...]
    strange: tuple[str, ...]


def read(log: str) -> Said:
    """Take ptxas's log (``-v``) of one kernel apart."""
    registers, spilled, serialized, strange = [0], 0, [], []
    compiled = False
    for line in filter(None, map(str.strip, log.splitlines())):
        text = NOTE.sub("", line)
        if COMPILING.fullmatch(text):
            compiled = True
        elif used := USED.fullmatch(text):
            registers.append(int(used[1]))
        elif stack := STACK.fullmatch(text):
            spilled += int(stack[1])
        elif SERIALIZED.fullmatch(text):
            serialized.append(text)
        elif not ROUTINE.fullmatch(text):
            strange.append(line)
    if not compiled or not any(registers):
        strange.append("not a word on what it compiled, into how many registers")
    return Said(max(registers), spilled, tuple(serialized), tuple(strange))


def listen(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[CompiledKernel, Said]:
    """``triton.compile``, and what ptxas said of it.

    Triton prints the log if asked to, so the messages are those of the very assembly that ships.
    A kernel from Triton's cache is assembled again, by Triton's own step and hence with the same flags.
    """
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
        if not log.getvalue():
            backend = make_backend(target)
            backend.make_cubin(compiled.asm["ptx"], {}, backend.parse_options(options), target.arch)
    return compiled, read(log.getvalue())
