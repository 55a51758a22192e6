"""What pyproject.toml cannot say: where the packages lie, and a compiled module that may be absent."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

RENAMED = {"kernels": "fastvit_kernels", "benchmarks": "fastvit_benchmarks"}
COMPILERS = ("c++", "g++", "clang++")
REMEDY = "the rest of fastvit works; to have it, put that right and install again"


class BuildOrSayWhy(build_ext):
    """Leaves the library or, where it cannot be built, a note of one line that fastvit.extension reads."""

    def run(self):
        library = Path(self.get_ext_fullpath("fastvit._C"))
        note = library.with_name("_C.missing")
        note.unlink(missing_ok=True)
        try:
            choose_compiler()
            super().run()
        except (CompileError, LinkError) as error:
            library.unlink(missing_ok=True)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"fastvit._C is not built: {error}; {REMEDY}\n")
            print(note.read_text(), end="", file=sys.stderr)

    def build_extensions(self):
        try:
            import pybind11
        except ImportError:
            raise CompileError("pybind11 was not found at install time") from None
        self.compiler.add_include_dir(pybind11.get_include())
        self.compiler.define_macro("FASTVIT_VERSION", quoted(self.distribution.get_version()))
        # setuptools runs a compiler through one of these two, by its version.
        self.compiler.call = self.compiler.spawn = run_quietly
        super().build_extensions()


def choose_compiler():
    """Python's own compiler, or another where that is absent: Python may come from another machine."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""
    if configured and shutil.which(shlex.split(configured)[0]):
        return
    found = next(filter(shutil.which, COMPILERS), None)
    if "CXX" in os.environ or found is None:
        looked_for = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise CompileError(f"no C++ compiler was found at install time (looked for {looked_for})")
    os.environ["CXX"] = found


def run_quietly(command, **_):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CompileError(f"{Path(command[0]).name} failed at install time: {first.strip()}")


def cuda_choice():
    """FASTVIT_CUDA, checked. What decides is nvcc: a machine that builds need not have a GPU."""
    choice = os.environ.get("FASTVIT_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        sys.exit(f"FASTVIT_CUDA must be auto, 0 or 1, not {choice!r}")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if choice == "1" and not (shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)):
        sys.exit("FASTVIT_CUDA=1 needs nvcc, which was found neither on PATH nor in CUDA_HOME/bin")
    return choice


def torch_version():
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def quoted(text):
    return f'"{text}"'


bindings = Extension(
    "fastvit._C",
    ["csrc/bindings.cpp"],
    language="c++",
    # Without debug information: the library then holds no path of the machine that built it.
    extra_compile_args=["-std=c++17", "-fvisibility=hidden", "-g0"],
    define_macros=[
        ("FASTVIT_TORCH", quoted(torch_version())),
        ("FASTVIT_CUDA", quoted(cuda_choice())),
    ],
)
packages = find_packages(include=["fastvit", "fastvit.*"])
for folder, name in RENAMED.items():
    packages += [name + found[len(folder) :] for found in find_packages(include=[folder, f"{folder}.*"])]

setup(
    packages=packages,
    package_dir={name: folder for folder, name in RENAMED.items()},
    package_data={"": ["**/*.json"]},
    # The stable-ABI libraries of the ops (CPU, and CUDA where cuda_choice() allows it) join this list.
    ext_modules=[bindings],
    cmdclass={"build_ext": BuildOrSayWhy},
)
