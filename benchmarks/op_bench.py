"""One op on one kind of input: every provider judged by the parity contract, and the right ones timed."""

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from textwrap import shorten
from typing import ClassVar

import torch
from torch import Tensor

from fastvit.contract import gemm_libraries, judge
from fastvit.verdicts import Check

from .harness import Call, Machine, Row, Timing, measure, ratios, rotating
from .roofline import DTYPES, peak_gbps, peak_tflops, products_in

Inputs = dict[str, Tensor]
Results = tuple[Tensor, ...]
# Once for each set of inputs: what is to be timed, as a call that returns its results.
Provider = Callable[["Case", Inputs], Callable[[], Results]]

DIRECTIONS = ("fwd", "bwd", "step")
INPUT_SETS = 3
INPUT_BYTES = 8 << 30  # of all sets together


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


@dataclass
class Outcome:
    """What a case gave: its rows, the checks behind them, and by provider its speed and why it is absent."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


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


def run_case(
    case: Case,
    providers: dict[str, Provider],
    device: torch.device,
    here: Machine,
    *,
    rounds: int = 20,
    seconds: float = 0.1,
) -> Outcome:
    """Judge the providers, then time those that are right, in rounds; the first is the baseline.

    A provider that cannot run is absent with its reason, and a wrong one has a row without a time.
    """
    outcome, calls, peaks = Outcome(case), {}, {}
    torch.compiler.reset()  # or the compiler takes the shapes of one case after another for dynamic ones
    with products_in(case.dtype), at_its_best():
        try:
            inputs = input_sets(case, device)
            known = truth(case, inputs[0])
        except torch.OutOfMemoryError as error:
            outcome.absent = dict.fromkeys(providers, in_words(error))
            return outcome
        for name, prepare in providers.items():
            try:
                prepared = [prepare(case, given) for given in inputs]
                outcome.checks[name] = checks(case, prepared[0](), *known)
                peaks[name] = peak_mb(prepared[0], device)
            except Exception as error:  # each library raises its own for what it cannot run
                outcome.absent[name] = in_words(error)
                outcome.checks.pop(name, None)
                continue
            if all(check.ok for check in outcome.checks[name]):
                calls[name] = rotating(lambda call: call(), prepared)
        timings = _timings(calls, device, rounds, seconds, outcome)
        baseline = next(iter(timings), None)
        outcome.speedups = ratios(timings, baseline) if baseline == next(iter(providers)) else {}
        outcome.rows = [
            _row(case, name, timings.get(name), found, peaks[name], device, here)
            for name, found in outcome.checks.items()
            if name not in outcome.absent
        ]
    return outcome


def in_words(error: BaseException) -> str:
    """An error in part of a line."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        text = "not enough memory"
    return shorten(text.splitlines()[0], 90, placeholder=" ...")


@contextmanager
def at_its_best() -> Iterator[None]:
    """torch at its best, compiled backwards that may run many times, and nothing said of what cannot run."""
    logging.disable(logging.WARNING)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
        logging.disable(logging.NOTSET)


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Several, so that the cache is not what is measured, within a bound of memory."""
    first = case.inputs(0, device)
    size = sum(tensor.nbytes for tensor in first.values())
    count = max(1, min(INPUT_SETS, INPUT_BYTES // max(1, size)))
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


def peak_mb(call: Callable[[], Results], device: torch.device) -> float | None:
    """The most memory that a call held beside its inputs, in 10^6 bytes; a CPU's allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _timings(
    calls: dict[str, Call], device: torch.device, rounds: int, seconds: float, outcome: Outcome
) -> dict[str, Timing]:
    if not calls:
        return {}
    try:
        return measure(calls, rounds=rounds, min_seconds=seconds, device=device)
    except torch.OutOfMemoryError as error:
        outcome.absent |= dict.fromkeys(calls, in_words(error))
        return {}


def _row(
    case: Case,
    provider: str,
    timing: Timing | None,
    checks: list[Check],
    peak_mb: float | None,
    device: torch.device,
    here: Machine,
) -> Row:
    errors = [check.e_rms / check.b_rms for check in checks if check.b_rms > 0]
    facts = {
        "op": case.op,
        "provider": provider,
        "dtype": case.dtype,
        "shape": case.shape,
        "batch": case.batch,
        "direction": case.direction,
        "peak_mb": peak_mb,
        "error_ratio": max(errors) if errors and all(map(math.isfinite, errors)) else None,
    }
    if timing is None:
        return Row.of(None, here, ok=False, **facts)
    rates = {"flops": case.flops, "bytes_moved": case.bytes_moved}
    peaks = {"peak_tflops": peak_tflops(device, case.dtype), "peak_gbps": peak_gbps(device)}
    return Row.of(timing, here, ok=True, **facts, **rates, **peaks)
