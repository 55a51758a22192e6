"""A wheel carries what was compiled: who installs it needs no compiler, and is told what is not inside."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from native_calls import needs_library

import fastvit

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fastvit", "kernels", "benchmarks", "csrc")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
PROGRAM = """
import torch, fastvit
from fastvit import extension, ops
x, w = torch.randn(2, 20, 8), torch.randn(8, 8)
with fastvit.use_backend("cpp"):
    out = ops.linear_residual(x, w, None, x)
torch.testing.assert_close(out, x + x @ w.T)
print(fastvit.__file__)
print(extension.build_info().version)
print(extension.why_no_ops("cuda"))
"""
# Where this installation could not be built, a wheel cannot be either.
pytestmark = needs_library()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, which has nothing compiled in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.missing", "results")
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    environment = os.environ | {"FASTVIT_CUDA": "0"}
    build = [*command, "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(build, cwd=tree, env=environment, check=True)
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_holds_the_library_and_the_reason_for_the_other(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastvit/_fastvit_cpu.so", "fastvit/_fastvit_cuda.missing", "fastvit/ops/native.py"} <= names
    assert {"fastvit_kernels/attention.py", "fastvit_kernels/tiles/sm_90.json"} <= names
    assert "fastvit_kernels/measured/cpu.json" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/"))]


def test_works_where_there_is_no_compiler(wheel, tmp_path):
    """In an environment of its own, which borrows torch and the rest from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "empty").mkdir()
    environment = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path), "FASTVIT_CUDA": "1"}
    command = [tmp_path / "env" / "bin" / "python", "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, version, reason = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert version == fastvit.__version__
    assert reason == "fastvit._fastvit_cuda is not built: FASTVIT_CUDA is 0"
