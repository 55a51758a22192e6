"""What a kernel's machine code asks of an H100, loop by loop, and how long that takes at the least: a model.

Nothing here has been measured. An SM issues 4 instructions a cycle; a warp's instruction holds its quarter's
MUFU for 8 cycles and its ALU for 2; HGMMA m64nNk16 takes N / 2 cycles, or as long as its operands need from
shared memory at 128 bytes a cycle. Left out: what lies outside the loops, latency, and that products which
ptxas serialises wait for each other. Triton kernels that were measured take 1.7 to 2.1 times the result.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .aot_compile import compile_launch
from .aot_sass import PRODUCT, WAIT, Instruction, disassemble, loops
from .aot_trips import Loop, Unknown, product_loops
from .launch import Launch

SMS, HERTZ, ACHIEVED_BANDWIDTH = 132, 1.755e9, 3.0e12
CALIBRATION = 1.7, 2.1
REGISTERS, SHARED, WARPS, CTAS = 65536, 233472, 64, 32
RESERVED = 1024  # bytes of shared memory that the system takes of each CTA's
MUFU = ("MUFU", "I2F", "F2I", "F2F")
# fmt: off
ALU = (
    "FMNMX", "F2FP", "LEA", "FSETP", "FSEL", "PLOP3", "LOP3", "MOV", "VIADD", "ISETP", "PRMT",
    "SHF", "IADD3", "SEL", "P2R", "R2P", "IABS", "IMNMX", "VIMNMX", "FCHK", "LOP", "POPC", "BREV",
    "VOTE",
)
# fmt: on
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
HMMA = re.compile(r"^HMMA\.16(8)(16|8|4)\b")


@dataclass(frozen=True)
class Body:
    """One trip of a loop. Cycles are those of four warps, one on each quarter of an SM.

    Attributes:
        issue: instructions of a warp.
        mufu, alu, tensor: cycles.
        products: how many HGMMA of each m and n: {"64x128": 4}.
        waits, barriers: for products, and of the whole CTA.
        flops: of four warps' products.
    """

    issue: int
    mufu: int
    alu: int
    tensor: int
    products: dict[str, int]
    waits: int
    barriers: int
    flops: int

    @staticmethod
    def of(code: Sequence[Instruction]) -> "Body":
        """Count a loop's instructions."""
        shapes = Counter("x".join(SHAPE.search(i.opcode).groups()[:2]) for i in code if i.is_a(PRODUCT))
        return Body(
            issue=len(code),
            mufu=8 * sum(i.is_a(*MUFU) for i in code),
            alu=2 * sum(i.is_a(*ALU) for i in code),
            tensor=sum(map(tensor_cycles, code)),
            products=dict(shapes),
            waits=sum(i.is_a(WAIT) for i in code),
            barriers=sum(i.is_a("BAR") for i in code),
            flops=sum(map(_flops, code)),
        )


@dataclass(frozen=True)
class Row:
    """A launch's machine code and times, or why there are none.

    Attributes:
        ctas, warps: on an SM at once.
        bodies: the innermost loops that hold products, or all of a kernel whose loops are unrolled.
        trips: of each, over the whole grid; () if unknown.
        bound: the scarcest resource, of issue, MUFU, ALU and tensor.
        floor: microseconds in which that resource does the loops' work.
        dram: microseconds in which every tensor passes once.
    """

    kernel: str
    label: str
    registers: int
    shared: int
    ctas: int
    warps: int
    bodies: tuple[Body, ...]
    trips: tuple[int, ...]
    bound: str
    floor: float
    dram: float
    unknown: str = ""

    @property
    def modelled(self) -> tuple[float, float]:
        """Microseconds, from and to."""
        return tuple(max(self.dram, factor * self.floor) for factor in CALIBRATION)


def count(launch: Launch, label: str) -> Row:
    """Compile a launch for sm_90 and count."""
    compiled, said = compile_launch(launch, 90)
    code = disassemble(compiled)
    bodies = tuple(body for body in map(Body.of, loops(code)) if body.flops)
    whole = Body.of(code)
    if not bodies and whole.flops:
        bodies = (whole,)
    ctas = occupancy(said.registers, compiled.metadata.shared, launch.num_warps)
    try:
        (outside, planned), unknown = product_loops(launch, compiled.asm["ttir"]), ""
        if bodies == (whole,):
            trips = unrolled(whole, launch, [outside, *planned])
        else:
            trips = match(bodies, launch, planned)
    except Unknown as reason:
        trips, unknown = (), str(reason)
    bound, floor = slowest(bodies, trips, launch.num_warps)
    return Row(
        launch.kernel.__name__,
        label,
        said.registers,
        compiled.metadata.shared,
        ctas,
        ctas * launch.num_warps,
        bodies,
        trips,
        bound,
        floor,
        1e6 * traffic(launch) / ACHIEVED_BANDWIDTH,
        unknown,
    )


def occupancy(registers: int, shared: int, warps: int) -> int:
    """How many CTAs are on an SM at once. Registers are given out to warps in units of 8 a thread."""
    of_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, SHARED // (shared + RESERVED), WARPS // warps, CTAS)


def match(bodies: Sequence[Body], launch: Launch, planned: Sequence[Loop]) -> tuple[int, ...]:
    """The trips of the loops in the machine code: those of the IR's, paired by how many products they hold.

    The machine code may hold more, but not twice as many: where a tile is 64 high and two groups of warps are
    there, both compute some products.

    Raises:
        Unknown: if they cannot be paired so, as where the compiler unrolled a loop in part.
    """
    made = [body.flops * launch.num_warps // 4 for body in bodies]
    order = sorted(range(len(made)), key=made.__getitem__)
    pairs = dict(zip(order, sorted(planned, key=lambda loop: loop.flops), strict=False))
    if len(made) != len(planned) or any(not 1 <= made[i] / loop.flops < 2 for i, loop in pairs.items()):
        raise Unknown(f"loops with {made} FLOP a trip, where the IR has {[loop.flops for loop in planned]}")
    return tuple(pairs[index].trips for index in range(len(made)))


def unrolled(whole: Body, launch: Launch, planned: Sequence[Loop]) -> tuple[int, ...]:
    """The trips of a kernel without a loop, which are its programs: all that the IR plans is in a line.

    Branches are, too: one that is always taken costs what lies in it.

    Raises:
        Unknown: if it holds other products than the IR has over all programs.
    """
    programs = math.prod(launch.grid)
    made, wanted = (
        whole.flops * launch.num_warps // 4 * programs,
        sum(loop.trips * loop.flops for loop in planned),
    )
    if not wanted or not 1 <= made / wanted < 2:
        raise Unknown(f"no loop and {made} FLOP, where the IR has {wanted}")
    return (programs,)


def slowest(bodies: Sequence[Body], trips: Sequence[int], warps: int) -> tuple[str, float]:
    """The resource that the loops keep busy for longest, and for how many microseconds."""
    if not trips:
        return "-", 0.0
    needs: dict[str, Callable[[Body], int]] = {
        "issue": lambda body: body.issue,
        "MUFU": lambda body: body.mufu,
        "ALU": lambda body: body.alu,
        "tensor": lambda body: body.tensor,
    }
    cycles = {
        name: sum(times * need(body) * warps / 4 for body, times in zip(bodies, trips, strict=True))
        for name, need in needs.items()
    }
    name = max(cycles, key=cycles.get)
    return name, 1e6 * cycles[name] / SMS / HERTZ


def tensor_cycles(instruction: Instruction) -> int:
    """Of an HGMMA. One that takes A from shared memory has a descriptor as its second operand."""
    if not instruction.is_a(PRODUCT):
        return 0
    columns = int(SHAPE.search(instruction.opcode)[2])
    from_shared = instruction.operands.split(", ")[1].startswith("gdesc")
    return max(columns // 2, (2048 * from_shared + 32 * columns) // 128)


def traffic(launch: Launch) -> int:
    """Bytes of all tensors of a launch. What is expanded lies in memory once."""
    total = 0
    for tensor in launch.args.values():
        if isinstance(tensor, Tensor):
            size = tensor.element_size()
            for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
                size *= extent if stride else 1
            total += size
    return total


def _flops(instruction: Instruction) -> int:
    if instruction.is_a(PRODUCT):
        m, n, k = map(int, SHAPE.search(instruction.opcode).groups())
        return 2 * m * n * k
    warp = HMMA.match(instruction.opcode)
    return 4 * 2 * 16 * int(warp[1]) * int(warp[2]) if warp else 0
