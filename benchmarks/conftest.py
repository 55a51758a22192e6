"""`pytest benchmarks/`: the same cases and providers as `fastvit bench`, through pytest-benchmark."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvit")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    group.addoption("--model", default="vit_tiny_patch16_224", help="a model of timm")
    group.addoption("--batch-size", type=int, default=1, help="images in a batch")
    group.addoption("--dtype", default="float32", help="float32, tf32, bfloat16 or float16")
    group.addoption("--all-cases", action="store_true", help="every case of each op, not a handful")


@pytest.fixture
def timed(benchmark, request):
    """Time a call, to its end on a GPU too, whose launches return at once."""
    on_gpu = torch.device(request.config.getoption("--device")).type == "cuda"

    def run(call, group, **notes):
        benchmark.group = group
        benchmark.extra_info |= notes

        def whole():
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return benchmark(whole)

    return run
