"""How calls are timed on a GPU, on one whose kernels and launches take what a test says."""

import contextlib

import pytest
import torch

from fastvit_benchmarks import gpu_timing
from fastvit_benchmarks.gpu_timing import Repeated
from fastvit_benchmarks.harness import measure, ratios

FLUSH, LAUNCH = 80e-6, 5e-6  # of 256 MB on an H100; of what is no call of ours
CLOCK = 2e9


class Gpu:
    """A host and a GPU, each with a time: launches lie in a queue, and waiting brings the host to its end."""

    def __init__(self):
        self.host = self.gpu = 0.0
        self.capturing, self.captures, self.strict = None, 0, 0

    def launch(self, seconds, host=LAUNCH):
        self.host += host
        if self.capturing is not None:
            self.capturing.seconds += seconds
        else:
            self.gpu = max(self.gpu, self.host) + seconds

    def synchronize(self, *_):
        if self.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.gpu)

    def call(self, host, kernel, waits=False):
        """So long in Python and so long on the GPU, in seconds; and between them it may wait for the GPU."""

        def run():
            if waits:
                self.synchronize()
            self.launch(kernel, host)

        return run

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        self.capturing, self.captures = graph, self.captures + 1
        try:
            yield
        finally:
            self.capturing = None


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self):
            self.at = max(made.gpu, made.host)

        def query(self):
            return self.at <= made.host

        def synchronize(self):
            made.host = max(made.host, self.at)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        seconds = 0.0

        def replay(self):
            made.launch(self.seconds)

    stands_in = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": made.capture,
        "synchronize": made.synchronize,
        "current_stream": lambda: None,
        "_sleep": lambda cycles: made.launch(cycles / CLOCK),
        "get_sync_debug_mode": lambda: made.strict,
        "set_sync_debug_mode": lambda mode: setattr(made, "strict", 1 if mode == "error" else mode),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "_flush", lambda device: lambda: made.launch(FLUSH))
    return made


def timed(calls):
    return measure(calls, rounds=3, warmup=1, device="cuda")


def test_a_small_call_is_timed_without_its_launches_and_with_them(gpu):
    """100 us in Python, 4 us on the GPU: between two events behind a flush of 80 us that reads as 24 us."""
    call = gpu.call(100e-6, 4e-6)
    found = timed({"events": call, "it": Repeated(call, 12)})
    assert found["it"].p50 == pytest.approx(4e-3)
    assert found["it"].in_eager.p50 == pytest.approx(100e-3)
    assert found["it"].timed == "graph"
    assert found["events"].p50 == pytest.approx(24e-3)
    assert found["events"].timed == "events"
    assert not found["events"].eager


@pytest.mark.parametrize("count", [1, 12])
def test_in_eager_a_large_call_takes_what_its_kernels_take(gpu, count):
    found = timed({"it": Repeated(gpu.call(100e-6, 900e-6), count)})["it"]
    assert found.p50 == pytest.approx(0.9)
    assert found.in_eager.p50 == pytest.approx(0.9)


def test_the_verdicts_of_eager_and_graph_are_two(gpu):
    found = timed(
        {"torch": Repeated(gpu.call(30e-6, 8e-6), 12), "ours": Repeated(gpu.call(100e-6, 4e-6), 12)}
    )
    assert ratios(found, "torch")["ours"] == pytest.approx(2)
    eager = {name: timing.in_eager for name, timing in found.items()}
    assert ratios(eager, "torch")["ours"] == pytest.approx(0.3)


def test_what_cannot_be_captured_is_queued_behind_a_sleep(gpu, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("a library's own graph cannot be captured")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    found = timed({"it": Repeated(gpu.call(100e-6, 4e-6), 12)})["it"]
    assert found.timed == "queued"
    assert found.p50 == pytest.approx(4e-3)
    assert found.in_eager.p50 == pytest.approx(100e-3)


def test_what_waits_for_the_gpu_is_never_captured_and_said_to_hold_the_host_s_time(gpu):
    calls = {
        "waits": Repeated(gpu.call(100e-6, 4e-6, waits=True), 12),
        "it": Repeated(gpu.call(100e-6, 4e-6), 12),
    }
    assert gpu.captures == 1
    assert gpu.strict == 0
    found = timed(calls)
    assert found["waits"].timed == "wall"
    assert found["waits"].p50 > 50e-3
    assert "waits" not in ratios(found, "it")
    eager = {name: timing.in_eager for name, timing in found.items()}
    assert ratios(eager, "it")["waits"] < 1


def test_a_call_alone_is_the_call(gpu):
    seen = []
    call = Repeated(lambda: seen.append(0) or len(seen), 3)
    before = len(seen)
    assert call() == before + 1
