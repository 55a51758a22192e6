"""`import fastvit` in fresh processes: it prints nothing, starts nothing and costs next to nothing."""

import statistics
import subprocess
import sys

# Of what torch's own import takes here: machines differ by half.
SHARE = 0.04


def python(code, *options):
    """Runs code in a process of its own, and returns what it printed."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


FORBID_CUDA = """
import torch
def forbidden(*args, **kwargs): raise AssertionError("CUDA was asked for at import")
for name in ("_lazy_init", "is_available", "device_count", "get_device_capability"):
    setattr(torch.cuda, name, forbidden)
"""

USE = """
x = torch.randn(2, 5, 3 * 2 * 16, requires_grad=True)
fastvit.ops.attention(x, 2).sum().backward()
assert x.grad.shape == x.shape
"""


def test_prints_nothing_and_starts_nothing():
    heavy = {
        "triton",
        "fastvit_kernels",
        "fastvit._C",
        "fastvit.verification",
        "fastvit.tuning",
        "fastvit.explanation",
    }
    assert python(f"{FORBID_CUDA}\nimport sys, fastvit\nprint({heavy} & set(sys.modules))") == "set()\n"


def test_works_without_optional_packages():
    optional = ("triton", "fastvit_kernels", "timm", "transformers", "torchvision", "onnx", "matplotlib")
    assert python(f"import sys\nsys.modules |= dict.fromkeys({optional})\nimport torch, fastvit{USE}") == ""


def test_works_after_fork():
    code = f"""
import os, sys, torch, fastvit
if (child := os.fork()) == 0:
    {USE.strip().replace(chr(10), chr(10) + "    ")}
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == ""


def test_costs_little_over_torch():
    # Processor time, and a median: other workers share the machine. The first run may compile our sources,
    # which a machine that keeps no bytecode did each time, for ours and not for torch's.
    code = """
import sys
from time import process_time
sys.dont_write_bytecode = False
begin = process_time()
import torch
between = process_time()
import fastvit
print((process_time() - between) / (between - begin))
"""
    assert statistics.median(float(python(code)) for _ in range(5)) < SHARE
