"""The scalar functions that the compiled ops are made of: activations, bfloat16, a norm's statistics."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import plain_ops
import pytest
import torch

from fastvit.contract import judge_saved

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (looked for c++, g++, clang++)")
sys.path.insert(0, str(CSRC))
import libraries  # noqa: E402

C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
NAMES = {torch.float32: "float", torch.float64: "double"}
ACTIVATIONS = [(name, dtype) for name in plain_ops.ACTIVATIONS for dtype in NAMES]
# What a function may be off by, in eps of the larger of the result and eps; x is exact.
ULPS = {torch.float32: 8, torch.float64: 8}


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    """The functions, compiled with the flags that the loops over rows have, in vectors where there are any."""
    library = tmp_path_factory.mktemp("row_maths") / "row_maths.so"
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *libraries.LOOP_FLAGS]
    flags += [flag for flag in libraries.LEVELS["v3"] if _has_v3()]
    command = [COMPILER, *flags, f"-I{CSRC}", str(TESTS / "row_maths.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _has_v3():
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def call(function, *arguments):
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))


def activated(maths, name, x):
    """Value, the value that comes with the slope, and the slope."""
    results = [torch.empty_like(x) for _ in range(3)]
    call(getattr(maths, f"{name}_{NAMES[x.dtype]}"), x, *results, ctypes.c_int64(x.numel()))
    return results


def true(name, x):
    """Value and slope in float64."""
    x = x.double().requires_grad_()
    value = plain_ops.ACTIVATIONS[name](x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def grid(dtype):
    return torch.cat([torch.linspace(-14, 14, 200_003, dtype=dtype), torch.linspace(-1e-3, 1e-3, 2001, dtype=dtype)])
