"""How often each loop of a launch runs, and with which products: read from Triton's IR and the arguments."""

import math
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .launch import Launch

PARAMETER = re.compile(r"%(\w+): (?:i\d+|!tt|f\d+|bf16)")
OPERATION = re.compile(r"(%[\w:]+) = ([\w.]+)(.*)")
LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)")
BRANCH = re.compile(r"scf\.if (%\w+)")
DOT = re.compile(r"\btt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
VALUE = re.compile(r"%\w+")
INTEGERS = {
    "arith.addi": torch.add,
    "arith.subi": torch.sub,
    "arith.muli": torch.mul,
    "arith.divsi": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "arith.remsi": torch.fmod,
    "arith.minsi": torch.minimum,
    "arith.maxsi": torch.maximum,
    "arith.andi": torch.bitwise_and,
    "arith.shrsi": torch.bitwise_right_shift,
    "arith.extsi": lambda a: a,
    "arith.extui": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.select": torch.where,
}
COMPARED = {
    "eq": torch.eq,
    "ne": torch.ne,
    "slt": torch.lt,
    "sle": torch.le,
    "sgt": torch.gt,
    "sge": torch.ge,
}


@dataclass
class Loop:
    """A loop that holds products, or what lies outside of loops, which each program runs once.

    Attributes:
        trips: over all programs of the grid together.
        flops: of the products in one trip of one program, nested loops' left out; the mean over all trips,
            where one of them is in a branch.
    """

    trips: int
    flops: int = 0


class Unknown(Exception):
    """A number of trips that does not follow from the arguments. The text says which."""


def product_loops(launch: Launch, ttir: str) -> tuple[Loop, list[Loop]]:
    """What lies outside of loops, and the loops that hold products, in the order of the IR.

    Integers are computed for all programs at once.

    Raises:
        Unknown: if a loop's bounds or a branch depend on more than the arguments and the place in the grid.
    """
    walk = _Walk(launch)
    for line in ttir.splitlines():
        walk.take(line.strip())
    return walk.outside, [loop for loop in walk.loops if loop.flops]


class _Walk:
    def __init__(self, launch: Launch):
        places = list(product(*(range(size) for size in reversed(launch.grid))))
        self.places = torch.tensor(places, dtype=torch.int64).flip(1).unbind(1)
        self.args, self.values = launch.args, {}
        self.loops: list[Loop] = []
        programs = math.prod(launch.grid)
        self.outside = Loop(programs)
        # For each brace that is open: how often each program gets there, the loop that it belongs to, and how
        # often each gets to its "else".
        everywhere = torch.ones(programs, dtype=torch.int64)
        self.open: list[tuple[Tensor, Loop, Tensor | None]] = [(everywhere, self.outside, None)]

    def take(self, line: str) -> None:
        """One line: close a region, compute an integer, count a product, open a region."""
        line = re.sub(r" loc\(.*\)$", "", line)
        if line.startswith("}"):
            times, loop, others = self.open.pop()
            if line.startswith("} else {"):
                self.open.append((others, loop, None))
                return
        if line.startswith("tt.func"):
            self.values |= {f"%{name}": self._argument(name) for name in PARAMETER.findall(line)}
        elif found := OPERATION.match(line):
            self.values[found[1]] = self._value(found[2], found[3])
        times, loop, _ = self.open[-1]
        if dot := DOT.search(line):
            flops = 2 * math.prod(map(int, dot.groups()))
            loop.flops += flops * int(times.sum()) // loop.trips if loop.trips else flops
        if line.endswith("{"):
            self.open.append(self._region(line, times, loop))

    def _region(self, line: str, times: Tensor, loop: Loop) -> tuple[Tensor, Loop, Tensor | None]:
        if bounds := LOOP.search(line):
            start, end, step = (self.values.get(name) for name in bounds.groups()[1:])
            if start is None or end is None or step is None:
                raise Unknown(f"the trips of {bounds[0]}")
            times = times * ((end - start + step - 1) // step).clamp(min=0)
            self.loops.append(Loop(int(times.sum())))
            return times, self.loops[-1], None
        if branch := BRANCH.search(line):
            condition = self.values.get(branch[1])
            if condition is None:
                raise Unknown(f"the way at {branch[0]}")
            return times * condition, loop, times * ~condition.bool()
        return times, loop, None

    def _argument(self, name: str) -> Tensor | None:
        given: Any = self.args.get(name)
        return torch.tensor(given) if isinstance(given, int) else None

    def _value(self, operation: str, rest: str) -> Tensor | None:
        if "tensor<" in rest:
            return None
        if operation == "arith.constant":
            number = re.match(r" (-?\d+|true|false)\b(?!\.)", rest)
            return number and torch.tensor(int({"true": 1, "false": 0}.get(number[1], number[1])))
        if operation == "tt.get_program_id":
            return self.places["xyz".index(rest.strip()[0])]
        if operation == "tt.get_num_programs":
            return torch.tensor(int(self.places["xyz".index(rest.strip()[0])].max()) + 1)
        operands = [self.values.get(name) for name in VALUE.findall(rest)]
        if any(operand is None for operand in operands):
            return None
        if operation == "arith.cmpi":
            compare = COMPARED.get(rest.split(",")[0].strip())
            return compare(*operands).long() if compare else None
        compute = INTEGERS.get(operation)
        return compute(*operands) if compute else None
