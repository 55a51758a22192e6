"""`fastvit bench model` and `compare`: whole models at inference, the providers interleaved."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from fastvit.contract import gemm_libraries, judge
from fastvit.fake_run import count_flops
from fastvit.verification import randomize

from . import roofline
from .bench import Bench, at_its_best, peak_mb
from .harness import Call, Row, Timing, machine, measure, rotating
from .model_peers import Peer
from .model_screen import Shown, progress
from .outputs import Outputs

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

    def images(self, sets: int) -> list[Tensor]:
        """Several sets of [B, C, H, W], the same each time."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(self.batch_size, *image_of(self.name), generator=generator) for _ in range(sets)]
        return [images.to(self.device, self.torch_dtype) for images in made]

    def call(self, direction: str) -> tuple:
        """As its rows have it."""
        return self.name, direction, self.dtype, image_of(self.name), self.batch_size


@cache
def image_of(name: str) -> tuple[int, ...]:
    """Channels, height and width of a model's images."""
    with torch.device("meta"):
        return tuple(timm.data.resolve_model_data_config(timm.create_model(name))["input_size"])


class SubjectBench(Bench):
    """A subject's providers, shown as a table for each direction when all is known."""

    def __init__(
        self,
        subject: Subject,
        what: str,
        directions: Sequence[str],
        rounds: int,
        console: Console,
        kept: Outputs,
    ) -> None:
        super().__init__(f"{subject.title}: {what}", directions, subject.device, kept)
        self.subject, self.rounds, self.console, self.here = subject, rounds, console, machine()
        self.work: float | None = None  # FLOPs of one forward pass

    def run_and_show(self, offered: Iterable[str], left_out: dict[str, str]) -> None:
        """Run those that the rows so far lack."""
        calls = [self.subject.call(direction) for direction in self.directions]
        names = self.outputs.lacking(calls, offered)
        if not names:
            return
        torch.compiler.reset()  # or the compiler takes this batch beside the last one for a dynamic one
        try:
            with at_its_best(), roofline.products_in(self.subject.dtype):
                self.run(names)
        finally:
            for direction in self.directions:
                rows = [row for row in self.rows if row.direction == direction]
                title = f"{self.title}, {direction}" if len(self.directions) > 1 else self.title
                if rows:
                    self.console.print(Shown(title, rows, self.speeds[direction], left_out))

    def measure(self, direction: str, calls: dict[str, Call], **how: Any) -> dict[str, Timing]:
        how |= {"settle": SETTLE[self.device.type], "device": self.device, "warmup": 2, "rounds": self.rounds}
        with progress(f"timing {direction}", self.rounds + 2, self.console) as tick:

            def on_round() -> None:
                tick()
                self.outputs.attempts.alive()

            return measure(calls, on_round=on_round, **how)

    def row(self, timing: Timing | None, **facts: Any) -> Row:
        facts["peak_tflops"] = roofline.peak_tflops(self.device, self.subject.dtype)
        named = zip(("op", "direction", "dtype", "shape", "batch"), self.subject.call(""), strict=True)
        return Row.of(timing, self.here, **dict(named) | facts)


class ModelBench(SubjectBench):
    """Its peers at inference."""

    def __init__(
        self, subject: Subject, peers: Iterable[Peer], rounds: int, console: Console, kept: Outputs
    ) -> None:
        super().__init__(subject, "inference", ("fwd",), rounds, console, kept)
        self.peers = {peer.name: peer for peer in peers}

    def begin(self) -> None:
        self.model = self.subject.model().eval()
        self.batches = self.subject.images(INPUT_SETS)
        self.yardsticks = _yardsticks(self.model, self.batches[0])
        self.work = flops(self.model, self.batches[0])

    def prepare(self, name: str) -> dict[str, Call]:
        """Compile or convert what the peer needs, and judge what it gives."""
        x = self.batches[0]
        with progress("preparing", 1, self.console) as step:
            step(name)
            call = self.peers[name].prepare(self.model, x)
            self.checks[name] = [judge("output", call(x), *self.yardsticks, kind="model")]
            self.peaks[name] = peak_mb(lambda: call(x), self.device)
        return {"fwd": rotating(call, self.batches)}

    def row(self, timing: Timing | None, **facts: Any) -> Row:
        found = self.checks.get(facts["provider"], [])
        ratio = found[0].e_rms / found[0].b_rms if found and found[0].b_rms else None
        return super().row(timing, flops=self.work, error_ratio=ratio, **facts)


@torch.no_grad()
def run(subject: Subject, peers: Sequence[Peer], rounds: int, console: Console, kept: Outputs) -> None:
    """Judge the peers, time those that are right, and keep what came of it: at Ctrl-C, of whole rounds."""
    missing = {peer.name: peer.missing(subject.device, subject.torch_dtype) for peer in peers}
    offered = [name for name, reason in missing.items() if reason is None]
    left_out = {name: reason for name, reason in missing.items() if reason is not None}
    ModelBench(subject, peers, rounds, console, kept).run_and_show(offered, left_out)


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
