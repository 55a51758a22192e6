"""Shared memory that one group of warps may overwrite while another group's wgmma still reads it.

A wait for an asynchronous product (``wgmma.wait_group``) holds up the four warps that issued it and no others
(triton-lang/triton issue 11047). With eight warps or more, what the product read may therefore be overwritten
only behind a ``bar.sync`` that comes after the wait. The scan follows the PTX along every path: a write that
may overlap what a product read, waited for and with no barrier since, is a race. It bounds addresses by
intervals; what it cannot bound overlaps everything, so it may accuse what is safe, and not the reverse.

Out of its sight: a write under a product that is still in flight, which would be wrong with one group too.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .aot_intervals import ANY, Interval, bounds

LABEL = re.compile(r"(\$L__BB\w+):")
PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.\w+\.\w+\.\w+ +\{[^}]*\}, *"
    r"(\{[^}]*\}|%\w+), *(%\w+)(.*);"
)
WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
# Of all threads, and under no condition.
BARRIER = re.compile(r"bar(?:rier)?\.sync(?:\.aligned)?\s+0;")
JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\S+?);")
ENDS = re.compile(r"(?:bra|ret|exit|trap)\b")
ADDRESS = re.compile(r"\[ *(%\w+) *(?:\+ *(-?\d+))? *\]")
READS = ("ld.shared", "ldmatrix", "fence.", "mbarrier.try_wait", "mbarrier.test_wait")
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's two highest bits


class State(NamedTuple):
    """Products by what has become of them, as indices of their instructions.

    Attributes:
        opened: issued, in no group yet.
        groups: committed and not waited for, the last first.
        waited: waited for, and no barrier since.
    """

    opened: frozenset[int] = frozenset()
    groups: tuple[frozenset[int], ...] = ()
    waited: frozenset[int] = frozenset()

    def joined(self, other: "State") -> "State":
        """What may be where two paths meet."""
        length = max(len(self.groups), len(other.groups))
        mine, theirs = (s.groups + (frozenset(),) * (length - len(s.groups)) for s in (self, other))
        groups = tuple(a | b for a, b in zip(mine, theirs, strict=True))
        return State(self.opened | other.opened, groups, self.waited | other.waited)

    def after(self, index: int, text: str) -> "State":
        """What is so behind an instruction."""
        if "wgmma.mma_async" in text:
            return self._replace(opened=self.opened | {index})
        if "wgmma.commit_group" in text:
            # Older than any wait tells apart: they stay together.
            kept, old = self.groups[:7], self.groups[7:]
            groups = (self.opened, *kept, *([frozenset().union(*old)] if old else []))
            return self._replace(opened=frozenset(), groups=groups)
        if found := WAIT.search(text):
            left = int(found[1])
            done = self.waited.union(*self.groups[left:])
            return self._replace(groups=self.groups[:left], waited=done)
        if BARRIER.fullmatch(text):
            return self._replace(waited=frozenset())
        return self


def races(ptx: str, warps: int) -> list[str]:
    """A line for each write of a kernel's PTX that may race with a product; none with one group of warps."""
    if warps <= 4 or "wgmma.mma_async" not in ptx:
        return []
    lines = [line.split("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    values = bounds(lines, warps)
    lines = [line for line in lines if _matters(line)]
    products = {index: list(_read(line, values)) for index, line in enumerate(lines) if "wgmma.mma" in line}
    found = []
    for index, state in sorted(_walk(lines).items()):
        if _writes(lines[index]):
            written = _written(lines[index], values)
            read = (one for one in sorted(state.waited) if any(map(written.overlaps, products[one])))
            if (product := next(read, None)) is not None:
                name = lines[product].split()[0].removeprefix("wgmma.mma_async.sync.aligned.")
                found.append(f"{lines[index].split(',')[0]} may overwrite what {name} reads")
    return found


def _matters(line: str) -> bool:
    jumps = LABEL.match(line) or JUMP.search(line) or ENDS.match(line) or "brx" in line
    return bool(jumps) or "wgmma" in line or "bar" in line or _writes(line)


def _walk(lines: Sequence[str]) -> dict[int, State]:
    """The state in front of each instruction that is reached, joined over all paths."""
    labels = {match[1]: index for index, line in enumerate(lines) if (match := LABEL.match(line))}
    states, todo = {0: State()}, [0]
    while todo:
        index = todo.pop()
        after = states[index].after(index, lines[index])
        for target in _next(index, lines[index], labels, len(lines)):
            joined = states[target].joined(after) if target in states else after
            if states.get(target) != joined:
                states[target] = joined
                todo.append(target)
    return states


def _next(index: int, line: str, labels: dict[str, int], end: int) -> Iterator[int]:
    if jump := JUMP.search(line):
        yield labels[jump[1]]
    if "brx" in line:  # to one of a table
        yield from labels.values()
    if not ENDS.match(line) and index + 1 < end:
        yield index + 1


def _writes(line: str) -> bool:
    text = re.sub(r"^@!?%\w+ +", "", line)
    return ".shared" in text and "[" in text and not text.startswith(READS)


def _written(line: str, values: dict[str, Interval]) -> Interval:
    address = ADDRESS.search(line)
    if stored := re.search(r"\bst\.shared(?:::cta)?(?:\.v(\d))?\.b(\d+)", line):
        size = int(stored[1] or 1) * int(stored[2]) // 8
    elif copied := re.search(r"\bcp\.async\.c[ag]\..*\], (0x\w+|\d+)", line):
        size = int(copied[1], 0)
    elif "stmatrix" in line:  # of each thread's address, a row
        size = 16
    else:
        return ANY
    return values.get(address[1], ANY).plus(int(address[2] or 0)).longer(size - 1) if address else ANY


def _read(line: str, values: dict[str, Interval]) -> Iterator[Interval]:
    """What a product reads in shared memory: B, and A unless that is in registers."""
    found = PRODUCT.search(line)
    if found is None:
        yield ANY
        return
    columns, depth, a, b, rest = found.groups()
    size = 32 // int(depth)
    # Behind the operands: whether to add, two signs, and for 16 bits whether A (in memory) and B
    # are transposed.
    transposed = [text.strip() != "0" for text in rest.split(",")[4:]] or [False]
    if not a.startswith("{"):
        yield _region(values.get(a, ANY), 64, int(depth), size, transposed[0])
    yield _region(values.get(b, ANY), int(columns), int(depth), size, transposed[-1])


def _region(descriptor: Interval, rows: int, depth: int, size: int, transposed: bool) -> Interval:
    """From a descriptor: bits 0 to 13 are the address, 16 to 29 and 32 to 45 two strides, all in 16 bytes."""
    if descriptor.low is None or descriptor.high is None or descriptor.low >> 14 != descriptor.high >> 14:
        return ANY
    fixed = descriptor.low >> 14
    leading, stride, swizzle = (
        (fixed >> 2 & 0x3FFF) * 16,
        (fixed >> 18 & 0x3FFF) * 16,
        SWIZZLES[fixed >> 48 & 3],
    )
    low, high = ((end & 0x3FFF) * 16 // swizzle * swizzle for end in (descriptor.low, descriptor.high))
    along, across = (depth, rows) if transposed else (rows, depth)
    beside = max(1, across * size // swizzle) - 1
    length = (max(1, along // 8) - 1) * stride + beside * leading + 8 * swizzle
    if transposed:  # Which of the strides is which depends on the swizzle.
        length = max(length, (max(1, along // 8) - 1) * leading + beside * stride + 8 * swizzle)
    return Interval(low, high + length - 1)
