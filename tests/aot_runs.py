"""`python -m fastvit_kernels.aot` on the toys, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def python(*arguments, **variables):
    # Where there is no GPU the tests interpret kernels, and interpreted kernels do not compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = f"{TESTS}{os.pathsep}{environment.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    environment |= {"PYTHONPATH": path} | variables
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def aot(*options, **variables):
    return python("-m", "fastvit_kernels.aot", "--module", "aot_toys", *options, **variables)
