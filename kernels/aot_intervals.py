"""Between which numbers a PTX kernel's integers lie: enough to tell where in shared memory it writes."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

LABEL = re.compile(r"\$L__BB\w+:")
REGISTER = re.compile(r"%\w+")
MOVE = re.compile(r"(@!?%\w+\s+)?([a-z]\w*(?:\.\w+|::\w+)*)\s+(\{[^}]*\}|%\w+)(?:\|%\w+)?, *(.*);")
NUMBER = re.compile(r"-?\d+$")
ROUNDS = 6  # of a loop, before a number that still grows is taken for any


COPIES = ("mov.b", "mov.u", "shfl.sync", "cvt.u64.u32", "cvt.u32.u64", "cvt.s64.s32")


class Move(NamedTuple):
    """An instruction that puts a value into registers, perhaps only under a condition."""

    guarded: bool
    name: str
    targets: tuple[str, ...]
    operands: list[str]


class Interval(NamedTuple):
    """Integers from low to high (None: no end), of which only the bits of ``bits`` may be set."""

    low: int | None
    high: int | None
    bits: int = -1

    @staticmethod
    def of(low: int | None, high: int | None, bits: int = -1) -> "Interval":
        """As told, and as its parts imply each other."""
        if low is not None and high is not None and low >= 0:
            bits &= low if low == high else (1 << high.bit_length()) - 1
        if bits >= 0:
            low, high = max(low or 0, 0), bits if high is None else min(high, bits)
        return Interval(low, high, bits)

    def plus(self, number: int) -> "Interval":
        """Moved by a number."""
        return _add(self, _constant(number))

    def longer(self, number: int) -> "Interval":
        """With more at its end."""
        return Interval(self.low, None if self.high is None else self.high + number)

    def overlaps(self, other: "Interval") -> bool:
        """Whether some integer lies in both."""
        return not (_below(self.high, other.low) or _below(other.high, self.low))

    def joined(self, other: "Interval") -> "Interval":
        """What lies in one or the other, and between them."""
        low = None if None in (self.low, other.low) else min(self.low, other.low)
        high = None if None in (self.high, other.high) else max(self.high, other.high)
        return Interval.of(low, high, self.bits | other.bits)


Values = dict[str, Interval]
ANY = Interval(None, None)
WORD = Interval.of(0, 2**32 - 1)


def bounds(lines: Sequence[str], warps: int) -> Values:
    """The interval of each register over all that is ever put into it. Shared memory begins at 0."""
    blocks: list[list[Move]] = [[]]
    for line in lines:
        if LABEL.match(line):
            blocks.append([])
        elif found := MOVE.match(line):
            guard, name, targets, operands = found.groups()
            blocks[-1].append(Move(bool(guard), name, tuple(REGISTER.findall(targets)), operands.split(", ")))
    moves = [move for block in blocks for move in block]
    # A test tells of a later choice only if nothing was put into its registers in between.
    times = Counter(register for move in moves for register in move.targets)
    single = {register for register in times if times[register] == 1}
    tests = {
        move.targets[0]: move
        for move in moves
        if move.name.startswith("setp.") and {move.targets[0], move.operands[0]} <= single
    }
    values: Values = {}
    for turn in count():
        before = dict(values)
        for block in blocks:
            seen = dict(values)
            for move in block:
                made = _result(move, seen, tests, warps)
                if made is None:  # of something that no path has computed yet
                    continue
                for register in move.targets:
                    old = values.get(register)
                    wide = made if old is None else old.joined(made)
                    values[register] = ANY if turn >= ROUNDS and wide != old else wide
                    # To the end of the block this is what is read, whatever other paths put there.
                    seen[register] = values[register] if move.guarded else made
        if before == values:
            return values


def _result(move: Move, values: Values, tests: dict[str, Move], warps: int) -> Interval | None:
    name, kind = move.name, move.name.split(".")[0]
    if len(move.targets) > 1:
        return ANY
    operands = [_operand(text, values, warps) for text in move.operands]
    if name.startswith(COPIES):
        first = operands[0]
        return _unsigned(first) if name.startswith("cvt.u") and first is not None else first
    if kind == "selp" and ".f" not in name:
        return _select(move, operands, tests)
    computed = COMPUTED.get(kind)
    if computed is None or ".hi" in name or not re.search(r"\.[bsu](16|32|64)$", name):
        return ANY
    if any(operand is None for operand in operands):
        return None
    if kind == "shr" and ".u" not in name and not _natural(operands[0]):
        return ANY
    return _wrapped(computed(*operands), name)


def _wrapped(value: Interval, name: str) -> Interval:
    """Any that keeps its lowest zeros, where the register is too small for the value."""
    width = int(name[-2:]) * (2 if ".wide" in name else 1)
    if value.low is None or value.high is None or value.low < -(1 << width - 1) or value.high >= 1 << width:
        return Interval(None, None, _multiples(value.bits))
    return value


def _operand(text: str, values: Values, warps: int) -> Interval | None:
    text = text.strip()
    if NUMBER.match(text):
        return _constant(int(text))
    if text == "global_smem":
        return _constant(0)
    if text == "%tid.x":
        return Interval.of(0, 32 * warps - 1)
    if re.match(r"%(r|rd|rs)\d+$", text):
        return values.get(text)
    return ANY


def _select(move: Move, operands: list[Interval | None], tests: dict[str, Move]) -> Interval | None:
    """A choice. A side that is itself what the test compares is cut to what the test leaves of it."""
    test = tests.get(move.operands[2])
    sides = []
    for text, operand, holds in zip(move.operands, operands, (True, False), strict=False):
        if operand is None:
            continue
        if test and text == test.operands[0] and NUMBER.match(test.operands[1]):
            limit, comparison = int(test.operands[1]), test.name.split(".", 1)[1]
            if (comparison, holds) in (("gt.s32", False), ("le.s32", True)):
                operand = _cut(operand, limit)
            elif (comparison, holds) in (("ge.s32", False), ("lt.s32", True)):
                operand = _cut(operand, limit - 1)
        sides.append(operand)
    return sides[0].joined(sides[-1]) if sides else None


def _cut(value: Interval, high: int) -> Interval:
    return Interval.of(value.low, high if value.high is None else min(high, value.high), value.bits)


def _constant(number: int) -> Interval:
    return Interval(number, number, number if number >= 0 else -1)


def _natural(value: Interval) -> bool:
    return value.low is not None and value.low >= 0


def _unsigned(value: Interval) -> Interval:
    return value if _natural(value) and value.high is not None else WORD


def _below(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a < b


def _add(a: Interval, b: Interval) -> Interval:
    low = None if None in (a.low, b.low) else a.low + b.low
    high = None if None in (a.high, b.high) else a.high + b.high
    # Without a carry the sum is the union; otherwise only the lowest zeros are common to both.
    bits = (
        a.bits | b.bits
        if a.bits >= 0 and b.bits >= 0 and not a.bits & b.bits
        else _multiples(a.bits | b.bits)
    )
    return Interval.of(low, high, bits)


def _multiples(bits: int) -> int:
    return -(bits & -bits) if bits else 0


def _subtract(a: Interval, b: Interval) -> Interval:
    low = None if a.low is None or b.high is None else a.low - b.high
    high = None if a.high is None or b.low is None else a.high - b.low
    return Interval.of(low, high)


def _multiply(a: Interval, b: Interval) -> Interval:
    if not (_natural(a) and _natural(b)) or a.high is None or b.high is None:
        return ANY
    return Interval.of(a.low * b.low, a.high * b.high, _multiples(a.bits) * -_multiples(b.bits))


def _or(a: Interval, b: Interval) -> Interval:
    for one, mask in ((a, b), (b, a)):
        if _natural(one) and mask.low == mask.high and mask.low is not None and not one.bits & mask.low:
            return Interval(one.low + mask.low, None if one.high is None else one.high + mask.low)
    if not (_natural(a) and _natural(b)):
        return ANY
    apart = not a.bits & b.bits
    high = None if None in (a.high, b.high) else a.high + b.high
    return Interval.of(a.low + b.low if apart else 0, high, a.bits | b.bits)


def _and(a: Interval, b: Interval) -> Interval:
    for one, mask in ((a, b), (b, a)):
        if _natural(one) and mask.low == mask.high and mask.low is not None and not one.bits & ~mask.low:
            return one
    bits = a.bits & b.bits
    return Interval.of(0, None, bits) if bits >= 0 else ANY


def _shift_left(a: Interval, b: Interval) -> Interval:
    if b.low is None or b.low != b.high:
        return ANY
    low, high = (None if end is None else end << b.low for end in (a.low, a.high))
    return Interval.of(low, high, a.bits << b.low)


def _shift_right(a: Interval, b: Interval) -> Interval:
    if b.low is None or b.low != b.high or b.low < 0:
        return ANY
    a = _unsigned(a)
    return Interval.of(a.low >> b.low, a.high >> b.low, a.bits >> b.low)


def _extract(a: Interval, start: Interval, length: Interval) -> Interval:
    return _and(_shift_right(a, start), _constant((1 << length.low) - 1))


COMPUTED = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "mad": lambda a, b, c: _add(_multiply(a, b), c),
    "or": _or,
    "xor": lambda a, b: _or(a, b)._replace(low=0) if _natural(a) and _natural(b) else ANY,
    "and": _and,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
}
