"""The same numbers on every run: seeds, threads, and what hypothesis tries."""

import os

import pytest
import torch
from hypothesis import settings

# Before triton is imported, which reads it once: kernels run on a CPU through its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

# Workers that each take every core wait for one another.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // WORKERS)))


def pytest_addoption(parser):
    parser.addoption("--library", metavar="FILE", help="the CPU library to test instead of the installed one")


def pytest_configure(config):
    if library := config.getoption("--library", None):
        from fastvit import extension

        torch.ops.load_library(library)
        installed = extension.why_no_ops
        extension.why_no_ops = lambda device: None if device == "cpu" else installed(device)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets how many threads torch uses, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one process."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
