"""Two processes train an accelerated model as one does, in DDP and sharded by FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerated import images, pair
from distributed_worker import BATCH, step
from native_calls import needs_library

import fastvit

pytestmark = needs_library()
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone():
    """What one process computes on the whole batch."""
    _, model = pair(img_size=32)
    with fastvit.use_backend("cpp"):
        return step(model.train(), images(batch=BATCH), world=1)


def run(how, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "distributed_worker.py"), how, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(how, tmp_path, alone):
    results = run(how, tmp_path)
    for result in results:
        assert result["fallbacks"] == []
        assert result["backends"] == ["cpp"]
        torch.testing.assert_close(result["loss"], alone["loss"], rtol=1e-5, atol=1e-6)
        assert result["grads"].keys() == alone["grads"].keys()
        for name, gradient in alone["grads"].items():
            error = (result["grads"][name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() + 1e-7, name
            torch.testing.assert_close(result["weights"][name], alone["weights"][name], rtol=1e-5, atol=1e-6)
    for name, gradient in results[0]["grads"].items():
        assert torch.equal(results[1]["grads"][name], gradient)
    if how == "fsdp":
        for name, weight in results[0]["weights"].items():
            assert torch.equal(results[0]["loaded"][name], weight)
