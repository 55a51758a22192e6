"""One op on one kind of input: every provider judged by the parity contract, and the right ones timed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check

from .bench import Bench, at_its_best, peak_mb
from .gpu_timing import Repeated, aside
from .harness import Call, Machine, Row, Timing, measure, rotating
from .outputs import Outputs
from .roofline import DTYPES, peak_gbps, peak_tflops, products_in

Inputs = dict[str, Tensor]
Results = tuple[Tensor, ...]
# Once for each set of inputs: what is to be timed, as a call that returns its results.
Provider = Callable[["Case", Inputs], Callable[[], Results]]

DIRECTIONS = ("fwd", "bwd", "step")
INPUT_SETS = 3
INPUT_BYTES = 8 << 30  # of all sets together
# On a GPU a sample is a call of each set: of small ones more, as where a sample begins and ends counts there.
GPU_SETS, GPU_BYTES = 12, 256 << 20


@dataclass(frozen=True)
class Case(ABC):
    """An op in a direction: "fwd", "bwd" (the backward alone) or "step" (both), in a dtype of ``DTYPES``.

    Inputs are the op's tensors by name, and "grad", the gradient of its output. Results are the output in
    "fwd", the gradients of ``trained`` in "bwd", and the output before those in "step".
    """

    direction: str
    dtype: str
    batch: int
    op: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """What a row says of the sizes beside the batch."""

    @property
    @abstractmethod
    def title(self) -> str:
        """In words, for people and for ``--filter``."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Of the products alone."""

    @property
    @abstractmethod
    def bytes_moved(self) -> float:
        """The fewest possible: what must be read and written if nothing is read twice or kept between."""

    @abstractmethod
    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Random numbers, the same for the same seed."""

    @abstractmethod
    def reference(self, **inputs: Tensor) -> Tensor:
        """The op in torch's own functions, in whatever dtype it is given."""

    @abstractmethod
    def parts(self, results: Results) -> dict[str, tuple[Tensor, str]]:
        """What is judged of the results: tensors with their kind (see ``judge``), by name."""

    @abstractmethod
    def uncancelled(self, **inputs: Tensor) -> Results:
        """How large the results would be if nothing cancelled: by absolute values, from inputs in float64."""

    def sample(self, tensors: Inputs) -> Inputs:
        """As much of the inputs as is judged."""
        return tensors

    def sampled(self, results: Results) -> Results:
        """The same part of the results."""
        return results

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def call(self) -> tuple:
        """As its rows have it."""
        return self.op, self.direction, self.dtype, self.shape, self.batch


@dataclass
class Outcome:
    """What a case gave: its rows, the checks behind them, and by provider its speed and why it is absent.

    ``eager``: the speed as Python calls it, where ``speedups`` is the GPU's alone.
    """

    case: Case
    rows: list[Row]
    checks: dict[str, list[Check]]
    speedups: dict[str, float]
    absent: dict[str, str]
    eager: dict[str, float] = field(default_factory=dict)

    def ratios(self, provider: str) -> tuple[float, float | None]:
        """The first's time by the provider's: as Python calls them, and in a graph, if that is another.

        Nothing is 0 but what has no speed. None in a graph is as Python calls it.
        """
        speed = self.speedups.get(provider)
        return (self.eager[provider], speed) if provider in self.eager else (speed or 0.0, None)

    def with_more(self, later: "Outcome") -> "Outcome":
        """And what other providers gave; of one that was there before, that stays."""
        known = {row.provider for row in self.rows}
        rows = self.rows + [row for row in later.rows if row.provider not in known]
        own = ((later.checks, self.checks), (later.speedups, self.speedups), (later.absent, self.absent))
        own += ((later.eager, self.eager),)
        return Outcome(self.case, rows, *(others | first for others, first in own))


def differentiated(forward: Callable[..., Tensor]) -> Provider:
    """A provider of all directions from the op's forward, by autograd."""

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Results]:
        given = {name: tensor for name, tensor in inputs.items() if name != "grad"}
        if case.direction == "fwd":
            return torch.no_grad()(lambda: (forward(**given),))
        leaves = {name: given[name].detach().requires_grad_() for name in case.trained}
        wanted, grad = list(leaves.values()), inputs["grad"]
        if case.direction == "bwd":
            out = forward(**given | leaves)
            return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

        def step() -> Results:
            out = forward(**given | leaves)
            return out.detach(), *torch.autograd.grad(out, wanted, grad)

        return step

    return prepare


def compiled(forward: Callable[..., Tensor]) -> Provider:
    """The same through torch.compile, which is given the shapes as constants."""
    return lambda case, inputs: differentiated(torch.compile(forward, fullgraph=True, dynamic=False))(
        case, inputs
    )


class OpBench(Bench):
    """A case's providers, judged by the parity contract."""

    def __init__(
        self,
        case: Case,
        providers: dict[str, Provider],
        device: torch.device,
        here: Machine,
        how: dict[str, float],
        outputs: Outputs | None = None,
    ) -> None:
        super().__init__(case.title, (case.direction,), device, outputs)
        self.case, self.providers, self.here, self.how = case, providers, here, how

    def begin(self) -> None:
        self.inputs = input_sets(self.case, self.device)
        self.known = truth(self.case, self.inputs[0])

    def prepare(self, name: str) -> dict[str, Call]:
        prepared = [self.providers[name](self.case, given) for given in self.inputs]
        self.checks[name] = checks(self.case, prepared[0](), *self.known)
        self.peaks[name] = peak_mb(prepared[0], self.device)
        call = rotating(lambda call: call(), prepared)
        # In the provider's own attempt: a capture can cost the process, and then nobody else's rows.
        return {self.case.direction: Repeated(call, len(prepared)) if self.device.type == "cuda" else call}

    def measure(self, direction: str, calls: dict[str, Call]) -> dict[str, Timing]:
        return measure(calls, device=self.device, on_round=self.outputs.attempts.alive, **self.how)

    def row(self, timing: Timing | None, **facts: Any) -> Row:
        case, found = self.case, self.checks.get(facts["provider"], [])
        errors = [check.e_rms / check.b_rms for check in found if check.b_rms > 0]
        facts |= {"op": case.op, "dtype": case.dtype, "shape": case.shape, "batch": case.batch}
        facts["error_ratio"] = max(errors) if errors and all(map(math.isfinite, errors)) else None
        if timing is not None:
            facts |= {"flops": case.flops, "bytes_moved": case.bytes_moved}
            peaks = peak_tflops(self.device, case.dtype), peak_gbps(self.device)
            facts |= dict(zip(("peak_tflops", "peak_gbps"), peaks, strict=True))
        return Row.of(timing, self.here, **facts)


def run_case(
    case: Case,
    providers: dict[str, Provider],
    device: torch.device,
    here: Machine,
    *,
    rounds: int = 20,
    seconds: float = 0.1,
    outputs: Outputs | None = None,
) -> Outcome:
    """Judge the providers and time them in rounds, as ``Bench`` does; the first is the baseline.

    One that cannot run is absent with its reason. One that is wrong has no speed, and of ours no time.
    """
    torch.compiler.reset()  # or the compiler takes the shapes of one case after another for dynamic ones
    bench = OpBench(case, providers, device, here, {"rounds": rounds, "min_seconds": seconds}, outputs)
    with products_in(case.dtype), at_its_best(), aside(device):
        bench.run(providers)
    absent = bench.absent | bench.untimed[case.direction]
    speeds = bench.speeds[case.direction]
    return Outcome(case, bench.rows, bench.checks, speeds, absent, bench.eager_speeds[case.direction])


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Several, so that the cache is not what is measured, within a bound of memory."""
    first = case.inputs(0, device)
    size = sum(tensor.nbytes for tensor in first.values())
    most, limit = (GPU_SETS, GPU_BYTES) if device.type == "cuda" else (INPUT_SETS, INPUT_BYTES)
    count = max(1, min(most, limit // max(1, size)))
    return [first, *(case.inputs(seed, device) for seed in range(1, count))]


def truth(case: Case, inputs: Inputs) -> tuple[Results, Results, list[Results]]:
    """Of the sample that is judged: float64, its size without cancellation, and torch's own in the dtype.

    torch's own by each of its GEMM libraries on the device.
    """
    sample = case.sample(inputs)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in sample.items()}
    reference = differentiated(case.reference)
    device = next(iter(inputs.values())).device
    torchs = []
    for _, context in gemm_libraries(device):
        with context():
            torchs.append(reference(case, sample)())
    return reference(case, exact)(), case.uncancelled(**exact), torchs


def checks(
    case: Case, results: Results, exact: Results, uncancelled: Results, own: list[Results]
) -> list[Check]:
    found, truth, sizes = (case.parts(values) for values in (case.sampled(results), exact, uncancelled))
    torchs = [case.parts(values) for values in own]
    how = {"tf32": case.dtype == "tf32", "backward": case.direction != "fwd"}
    return [
        judge(name, out, truth[name][0], [t[name][0] for t in torchs], kind=kind, scale=sizes[name][0], **how)
        for name, (out, kind) in found.items()
    ]
