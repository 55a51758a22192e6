"""`fastvit bench model` and `compare`: whole models at inference, the providers interleaved."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from fastvit.contract import gemm_libraries, judge
from fastvit.fake_run import count_flops
from fastvit.verdicts import Check
from fastvit.verification import randomize

from . import roofline
from .harness import Row, Stopped, Timing, machine, measure, ratios, rotating
from .model_peers import Call, Peer
from .model_screen import Shown, progress
from .op_bench import at_its_best, in_words, peak_mb

INPUT_SETS = 3
# Seconds after which an engine's threads, that spin for more work, sleep and disturb no other.
SETTLE = {"cpu": 0.02, "cuda": 0.0}


@dataclass(frozen=True)
class Subject:
    """A model of timm with random weights, and its images, in a dtype of ``roofline.DTYPES``."""

    name: str
    batch_size: int
    dtype: str
    device: torch.device

    @property
    def title(self) -> str:
        return f"{self.name}, batch {self.batch_size}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return roofline.DTYPES[self.dtype]

    def model(self) -> nn.Module:
        return randomize(timm.create_model(self.name)).to(self.device, self.torch_dtype)

    def images(self, model: nn.Module, sets: int) -> list[Tensor]:
        """Several sets of [B, C, H, W], the same each time."""
        size = timm.data.resolve_model_data_config(model)["input_size"]
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(self.batch_size, *size, generator=generator) for _ in range(sets)]
        return [images.to(self.device, self.torch_dtype) for images in made]


@dataclass
class Prepared:
    """Peers that are ready to be timed, what was judged of each, and why others cannot run."""

    calls: dict[str, Call] = field(default_factory=dict)
    verdicts: dict[str, Check] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def run(
    subject: Subject,
    peers: tuple[Peer, ...],
    rounds: int,
    console: Console,
    keep: Callable[[Shown], None],
) -> None:
    """Judge the peers, time those that are right, hand over what came of it: at Ctrl-C, of whole rounds."""
    torch.compiler.reset()  # or the compiler takes this batch beside the last one for a dynamic one
    with at_its_best(), roofline.products_in(subject.dtype):
        model = subject.model().eval()
        batches = subject.images(model, INPUT_SETS)
        ready = prepare(subject, model, batches[0], peers, console)
        work = flops(model, batches[0])
        how = {"rounds": rounds, "warmup": 2, "settle": SETTLE[subject.device.type], "device": subject.device}
        calls = {name: rotating(call, batches) for name, call in ready.calls.items()}
        try:
            with progress("timing", rounds + 2, console) as tick:
                timings = measure(calls, on_round=tick, **how) if calls else {}
        except Stopped as stop:
            keep(shown(subject, ready, stop.timings, batches[0], work))
            raise
        keep(shown(subject, ready, timings, batches[0], work))


def prepare(
    subject: Subject, model: nn.Module, x: Tensor, peers: tuple[Peer, ...], console: Console
) -> Prepared:
    """Compile or convert what each peer needs, and judge what it gives."""
    ready, yardsticks = Prepared(), _yardsticks(model, x)
    with progress("preparing", len(peers), console) as step:
        for peer in peers:
            step(peer.name)
            if reason := peer.missing(subject.device, subject.torch_dtype):
                ready.absent[peer.name] = reason
                continue
            try:
                call = peer.prepare(model, x)
                verdict = judge("output", call(x), *yardsticks, kind="model")
                ready.peaks[peer.name] = peak_mb(lambda call=call: call(x), subject.device)
            except Exception as error:  # each library raises its own for what it cannot run
                ready.absent[peer.name] = in_words(error)
                continue
            ready.verdicts[peer.name] = verdict
            if verdict.ok:
                ready.calls[peer.name] = call
    return ready


def shown(subject: Subject, ready: Prepared, timings: dict[str, Timing], x: Tensor, work: float) -> Shown:
    """Rows of all that were judged, with times where there are any."""
    facts = {"op": subject.name, "dtype": subject.dtype, "batch": subject.batch_size, "shape": x.shape[1:]}
    facts |= {"flops": work, "peak_tflops": roofline.peak_tflops(subject.device, subject.dtype)}
    made, here = Shown(f"{subject.title}: inference", absent=ready.absent), machine()
    for name, verdict in ready.verdicts.items():
        ratio = verdict.e_rms / verdict.b_rms if verdict.b_rms else None
        own = {"provider": name, "ok": verdict.ok, "peak_mb": ready.peaks[name], "error_ratio": ratio}
        made.rows.append(Row.of(timings.get(name), here, **facts | own))
        if not verdict.ok:
            made.wrong[name] = str(verdict)
    if timings:
        made.speeds = ratios(timings, next(iter(timings)))
    return made


def _yardsticks(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output in float64, and torch's own by each of its GEMM libraries."""
    torchs = []
    for _, context in gemm_libraries(x.device):
        with context():
            torchs.append(model(x))
    return copy.deepcopy(model).double()(x.double()), torchs


def flops(model: nn.Module, images: Tensor) -> float:
    """Of one forward pass."""
    return count_flops(model, (images,), {})["Global"]
