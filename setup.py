"""What pyproject.toml cannot say: where the packages lie, and compiled parts of which any may be absent."""

import hashlib
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

# Beside the sources that it compiles; a build frontend puts no folder of the project's on the path.
sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import libraries

RENAMED = {"kernels": "fastvit_kernels", "benchmarks": "fastvit_benchmarks"}
COMPILERS = ("c++", "g++", "clang++")
REMEDY = "the rest of fastvit works; to have it, put that right and install again"
# In the build folder: beside the libraries it would go along to another machine with them.
RECORD = "built.sha256"


class BuildOrSayWhy(build_ext):
    """Leaves each compiled part or, where it cannot be built, a note that fastvit.extension reads.

    What was built here and is left out now goes: it is stale. What came from elsewhere stays.
    """

    def run(self):
        self.folder = Path(self.get_ext_fullpath("fastvit._C")).parent
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = Path(self.get_finalized_command("build").build_base, RECORD)
        # The libraries first: the module says for which architectures they are.
        self.part("_fastvit_cpu", ".so", self.build_cpu)
        if cuda_choice() == "0":
            self.leave_out("_fastvit_cuda", ".so", "FASTVIT_CUDA is 0")
        else:
            self.part("_fastvit_cuda", ".so", self.build_cuda, required=cuda_choice() == "1")
        suffix = Path(self.get_ext_fullpath("fastvit._C")).name.removeprefix("_C")
        self.part("_C", suffix, self.build_module)

    def part(self, name, suffix, build, required=False):
        try:
            build()
        except (CompileError, LinkError, libraries.Unbuildable) as error:
            self.leave_out(name, suffix, error, "" if required else REMEDY)
            if required:
                sys.exit(f"FASTVIT_CUDA=1, but fastvit.{name} cannot be built: {error}")
        else:
            self.note(name).unlink(missing_ok=True)
            self.remember(self.folder / (name + suffix))

    def leave_out(self, name, suffix, why, remedy=""):
        library = self.folder / (name + suffix)
        if library.is_file() and not self.is_ours(library):
            self.note(name).unlink(missing_ok=True)
            stays = f"{library.name} was not built here, and stays"
            print(f"fastvit.{name} is not rebuilt: {why}; {stays}", file=sys.stderr)
            return
        library.unlink(missing_ok=True)
        said = "; ".join(filter(None, (f"fastvit.{name} is not built: {why}", remedy)))
        self.note(name).write_text(f"{said}\n")
        if remedy:
            print(said, file=sys.stderr)

    def note(self, name):
        return self.folder / f"{name}.missing"

    def remember(self, library):
        if not self.is_ours(library):
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with self.record.open("a") as record:
                record.write(f"{digest(library)}\n")

    def is_ours(self, library):
        return self.record.is_file() and digest(library) in self.record.read_text().split()

    def build_cpu(self):
        tools = libraries.Tools(choose_compiler(), libraries.torch_folder())
        self.install(libraries.build_cpu(tools, self.work("cpu")))

    def build_cuda(self):
        tools = libraries.Tools(choose_compiler(), libraries.torch_folder(), libraries.find_nvcc())
        archs = libraries.chosen_archs()
        self.install(libraries.build_cuda(tools, self.work("cuda"), archs, libraries.find_cutlass(archs)))

    def work(self, device):
        return (Path(self.build_temp) / device).resolve()

    def install(self, library):
        # Another name first: a process that has the old one loaded keeps it.
        new = self.folder / f"{library.name}.new"
        shutil.copy(library, new)
        new.replace(self.folder / library.name)

    def build_module(self):
        choose_compiler()
        (module,) = self.extensions
        archs, cutlass = libraries.built_for(self.folder / "_fastvit_cuda.so")
        module.define_macros.append(("FASTVIT_CUDA_ARCHS", quoted(" ".join(archs))))
        module.define_macros.append(("FASTVIT_CUTLASS", quoted(cutlass)))
        self.force = True  # its sources may be older than what it tells of the libraries
        super().run()

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
        return shlex.split(configured)[0]
    found = next(filter(shutil.which, COMPILERS), None)
    if "CXX" in os.environ or found is None:
        looked_for = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise CompileError(f"no C++ compiler was found at install time (looked for {looked_for})")
    os.environ["CXX"] = found
    return found


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
    if choice == "1" and libraries.find_nvcc() is None:
        sys.exit("FASTVIT_CUDA=1 needs nvcc, which was found neither on PATH nor in CUDA_HOME/bin")
    return choice


def torch_version():
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    ext_modules=[bindings],
    cmdclass={"build_ext": BuildOrSayWhy},
)
