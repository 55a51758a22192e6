"""The headers of fc1's products on Hopper, compiled for the CPU behind plain C names."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (looked for c++, g++, clang++)")
sys.path.insert(0, str(CSRC))
import libraries  # noqa: E402

H100 = 132  # multiprocessors
# In the order of the C++ enumeration.
KINDS = ("forward", "folded", "folded_linear", "backward", "residual")


def compiled(folder, sources=CSRC):
    """The headers behind plain C names."""
    library = folder / "fc1.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += libraries.LOOP_FLAGS
    files = [TESTS / "fc1.cpp", sources / "fc1_measured.cpp"]
    command = [COMPILER, *flags, f"-I{sources}", *map(str, files), "-o", str(library)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(library))
    library.cost.restype = ctypes.c_double
    library.rows_of_partials.restype = ctypes.c_int64
    return library


def compiled_with(mutant, folder, compiled=compiled):
    """The same of a copy that has the fault in it."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources, ignore=shutil.ignore_patterns("*.cu*", "*.py", "__pycache__"))
    text = (sources / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} holds {text.count(mutant.old)} times: {mutant.old}"
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return compiled(folder, sources)


def call(function, *arguments):
    of = {int: ctypes.c_int64, torch.Tensor: lambda tensor: ctypes.c_void_p(tensor.data_ptr())}
    return function(*(of.get(type(a), lambda a: a)(a) for a in arguments))
