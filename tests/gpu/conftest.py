"""What a GPU alone can show: run by `make test-gpu`, skipped with the reason where there is none.

These tests need torch, triton and pytest beside fastvit, and nothing else. By hand:

    python -m pytest tests/gpu --confcutdir=tests/gpu -p no:cacheprovider -rs

With ``--interpreted`` those that compare numbers run on a CPU, in float16 and float32. What the machine lacks
beside a GPU is no reason to skip: such tests are left out by name (needs.py).
"""

import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Modules beside this file are found by their bare names, as those in tests/ are.
sys.path.append(str(Path(__file__).parent))

from isolation import Isolation
from keeping import Outcomes, keep_verdicts
from needs import LeftOut

OLDEST_CAPABILITY = (8, 0)


def pytest_addoption(parser):
    parser.addoption("--need-gpu", action="store_true", help="fail at once where there is no GPU to test on")
    parser.addoption("--interpreted", action="store_true", help="compare numbers in Triton's interpreter")
    parser.addoption("--no-runtime", action="store_true", help="leave out what needs CUDA itself")
    parser.addoption("--hang", type=float, default=0, metavar="SECONDS", help="end a test's process by then")
    parser.addoption("--keep", metavar="FOLDER", help="keep what each test and check came to")


def pytest_configure(config):
    if config.getoption("--need-gpu", default=False) and (reason := missing()):
        pytest.exit(f"no GPU was tested: {reason}", returncode=1)
    if config.getoption("--interpreted", default=False):
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once
    runtime = not config.getoption("--no-runtime", default=False)
    config.pluginmanager.register(LeftOut(missing() is None, runtime))
    config.pluginmanager.register(Isolation(config, config.getoption("--hang", default=0)))
    if folder := config.getoption("--keep", default=None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep_verdicts(folder)
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(Outcomes(folder))


def missing() -> str | None:
    """Why there is no GPU to test on, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    found = torch.cuda.get_device_capability()
    if found >= OLDEST_CAPABILITY:
        return None
    has, needed = (".".join(map(str, pair)) for pair in (found, OLDEST_CAPABILITY))
    return f"{torch.cuda.get_device_name()} has compute capability {has}; the kernels need {needed}"


@pytest.fixture(autouse=True)
def _machine(request):
    interpreted = request.config.getoption("--interpreted", default=False)
    if not interpreted and (reason := missing()):
        pytest.skip(reason)
    torch.manual_seed(0)


@pytest.fixture
def gpu() -> torch.device:
    """For tests of what the interpreter has not: streams, graphs, an allocator."""
    if reason := missing():
        pytest.skip(reason)
    torch.cuda.synchronize()
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def room(gpu):
    """Tests that take much of the GPU's memory run one at a time, whatever the processes."""
    with open(Path(tempfile.gettempdir(), f"fastvit-test-gpu-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()
