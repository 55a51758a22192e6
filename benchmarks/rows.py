"""Result rows: one JSON list per file under benchmarks/results/<gpu or cpu>/."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self

from .machine import Machine
from .timing import How, Timing

Direction = Literal["fwd", "bwd", "step"]
OURS = "fastvit"  # how providers that are ours begin
ROOFS = ("copy", "matmul")  # ops that are the machine's own limits
WRONG = "wrong"  # how the reason of a row begins that the contract refused


@dataclass(frozen=True)
class Row:
    """One provider's number with all it needs to be believed; what was not measured is None.

    ``reason`` says why a row is not ``ok``. One of ours that is wrong has no time, others keep theirs.
    ``speed`` is over the first provider in the same rounds, of which there may be others than its row's. Of
    an op on a GPU ``ms_p50`` and ``speed`` are the kernels' own, as ``timed`` says, and ``eager_ms_p50`` and
    ``eager_speed`` those of calls that Python makes. Rows of the op "copy" and "matmul" are the machine's
    own roofline in the same run.
    """

    op: str
    provider: str
    direction: Direction
    dtype: str
    shape: tuple[int, ...]
    batch: int
    ms_p20: float | None
    ms_p50: float | None
    ms_p80: float | None
    tflops: float | None
    gbps: float | None
    roofline_pct: float | None
    peak_mb: float | None
    error_ratio: float | None
    ok: bool
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    commit: str | None
    date: str
    cpu: str | None = None
    threads: int | None = None
    reason: str | None = None
    speed: float | None = None
    timed: How | None = None
    eager_ms_p50: float | None = None
    eager_speed: float | None = None

    def speed_over(self, first: "Row") -> float:
        """How many times as fast as the call's first provider; older rows say it by their times alone."""
        return self.speed or first.ms_p50 / self.ms_p50

    @property
    def verdict(self) -> str:
        """ "ok", "wrong" or "not run"; rows without a reason are older, and were kept only if judged."""
        if self.ok:
            return "ok"
        return "wrong" if (self.reason or WRONG).startswith(WRONG) else "not run"

    @property
    def call(self) -> tuple:
        """What was called, whoever provided it."""
        return self.op, self.direction, self.dtype, self.shape, self.batch

    @property
    def machine(self) -> str:
        """The GPU, else the CPU and how many of its threads."""
        cpu = self.cpu and f"{self.cpu}, {self.threads} threads"
        return self.gpu or cpu or "a CPU whose name was not kept"

    @classmethod
    def of(
        cls,
        timing: Timing | None,
        machine: Machine,
        *,
        op: str,
        provider: str,
        dtype: str,
        shape: Iterable[int],
        batch: int,
        ok: bool,
        direction: Direction = "fwd",
        flops: float | None = None,
        bytes_moved: float | None = None,
        peak_tflops: float | None = None,
        peak_gbps: float | None = None,
        peak_mb: float | None = None,
        error_ratio: float | None = None,
        reason: str | None = None,
        speed: float | None = None,
        eager_speed: float | None = None,
    ) -> Self:
        """A row from a timing, or without one.

        Args:
            flops, bytes_moved: of one call.
            peak_tflops, peak_gbps: the roofline measured on the same card.
            peak_mb: the most memory the call held.
            error_ratio: its error against the oracle over that of torch's own op.
        """
        tflops = flops / timing.p50 / 1e9 if timing and flops is not None else None
        gbps = bytes_moved / timing.p50 / 1e6 if timing and bytes_moved is not None else None
        shares = [got / peak for got, peak in ((tflops, peak_tflops), (gbps, peak_gbps)) if got and peak]
        return cls(
            op=op,
            provider=provider,
            direction=direction,
            dtype=dtype,
            shape=tuple(shape),
            batch=batch,
            ms_p20=timing and timing.p20,
            ms_p50=timing and timing.p50,
            ms_p80=timing and timing.p80,
            tflops=tflops,
            gbps=gbps,
            roofline_pct=100 * max(shares) if shares else None,
            peak_mb=peak_mb,
            error_ratio=error_ratio,
            ok=ok,
            gpu=machine.gpu,
            driver=machine.driver,
            torch=machine.torch,
            triton=machine.triton,
            commit=machine.commit,
            date=machine.date,
            cpu=None if machine.gpu else machine.cpu,
            threads=None if machine.gpu else machine.threads,
            reason=reason,
            speed=speed,
            timed=timing and timing.timed,
            eager_ms_p50=timing.in_eager.p50 if timing and timing.eager else None,
            eager_speed=eager_speed,
        )


def check_providers(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names of nobody.

    Raises:
        ValueError: with those there are.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown provider {unknown[0]!r}; the providers are {'; '.join(known)}")


def save(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows as one JSON list, one row a line so that a diff reads well."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    partial = Path(f"{path}.part")
    partial.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")
    partial.replace(path)  # whoever ends the program now leaves a whole file


def load(path: str | Path) -> list[Row]:
    """The rows of a file that `save` wrote."""
    names = {field.name for field in fields(Row)}
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a file of benchmark rows: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of benchmark rows, which is a list")
    if unknown := {key for row in rows for key in row} - names:
        raise ValueError(f"{path} has fields that rows do not: {', '.join(sorted(unknown))}")
    try:
        return [Row(**row | {"shape": tuple(row["shape"])}) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a row that is not whole: {error}") from None
