"""A kernel's machine code (SASS) taken apart: its instructions, its loops, and its asynchronous products."""

import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) +)?([A-Z][\w.]*) *(.*?) *;")
LABEL = re.compile(r"(\.L_x_\d+):")
JUMP = re.compile(r"`\((\.L_x_\d+)\)")
PRODUCT, WAIT = "HGMMA", "WARPGROUP.DEPBAR"


class Instruction(NamedTuple):
    """One instruction: "@P0 BRA .L" has the guard "P0", and a target, the index of the instruction at .L."""

    guard: str
    opcode: str
    operands: str
    target: int | None = None

    def is_a(self, *names: str) -> bool:
        """Whether its opcode is one of these, or begins with one and a dot."""
        return any(self.opcode == name or self.opcode.startswith(f"{name}.") for name in names)


def disassemble(compiled: CompiledKernel) -> list[Instruction]:
    """The instructions of a compiled kernel, by the disassembler that Triton brings."""
    cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", cubin]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(text: str) -> list[Instruction]:
    """nvdisasm's text as instructions, in the order of their addresses.

    Raises:
        ValueError: if there are none, or one jumps to a label that is not there.
    """
    found, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := LINE.search(line):
            found.append(Instruction(code[2] or "", code[3], code[4]))
    if not found:
        raise ValueError("the disassembly holds no instruction")
    return [_aimed(instruction, labels) for instruction in found]


def _aimed(instruction: Instruction, labels: dict[str, int]) -> Instruction:
    jump = JUMP.search(instruction.operands)
    if jump is None or instruction.is_a("BSSY"):  # which only names the place where threads meet again
        return instruction
    if jump[1] not in labels:
        raise ValueError(f"a jump to {jump[1]}, which is nowhere")
    return instruction._replace(target=labels[jump[1]])


def loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The bodies of the innermost loops: what lies between a jump backwards and where it leads."""
    spans = [
        (jump.target, end) for end, jump in enumerate(code) if jump.target is not None and jump.target < end
    ]
    return [
        code[start : end + 1]
        for start, end in spans
        if not any(start <= first and last <= end for first, last in spans if (first, last) != (start, end))
    ]


def count_products(code: Sequence[Instruction]) -> tuple[int, int]:
    """How many asynchronous products there are, and waits for them: as many as products is one by one."""
    return sum(i.is_a(PRODUCT) for i in code), sum(i.is_a(WAIT) for i in code)
