"""Builds the two libraries of ops with ninja: fastvit/_fastvit_cpu.so and fastvit/_fastvit_cuda.so.

setup.py uses it. They are on torch's stable ABI from 2.11 on: one library serves every later torch and every
Python, so torch is a folder of headers and libraries here, and is not imported.
"""

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
SHARED = ("layer_norm_linear.cpp", "linear_residual.cpp", "layer_norm_mlp.cpp", "registration.cpp")
CPU = ("rows_cpu.cpp", "row_moments_cpu.cpp", "products_cpu.cpp", "attention_cpu.cpp")
CPU += ("weight_samples_cpu.cpp",)
LOOPS = ("row_loops", "panels", "attention_heads")
# Vector instructions that its loops are compiled for; the library takes the best at run time.
LEVELS = {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512")}
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# -g0 and the map: a library holds no path of the machine that built it.
FLAGS = ("-std=c++17", "-O3", "-g0", f"-ffile-prefix-map={CSRC}=csrc", "-fPIC", "-fvisibility=hidden")
FLAGS += ("-Wall", "-Wextra", TARGET)
LOOP_FLAGS = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
NVCC_STRICT = ("-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage")
ARCHS = ("80", "89", "90a", "100", "120")
# Sources for one architecture alone, made of CUTLASS. Its assertions are calls, before which ptxas would wait
# for every product under way (C7510).
HOPPER = "90a"
HOPPER_SOURCES = "*_sm90.cu"
CUTLASS_FLAGS = ("-DNDEBUG", "-DFASTVIT_CUTLASS")
# In the CUDA library itself: for which architectures it is, and CUTLASS's version.
BUILT_FOR = "fastvit built for {}; CUTLASS {}"
NO_CUTLASS = "CUTLASS's headers are absent (pip install --no-deps nvidia-cutlass)"


class Unbuildable(Exception):
    """Why a library cannot be built here, in one line."""


@dataclass(frozen=True)
class Tools:
    """What a build needs of the machine: the compilers and torch's folder."""

    cxx: str
    torch: Path
    nvcc: str | None = None

    @property
    def include(self) -> tuple[str, ...]:
        return ("-isystem", str(self.torch / "include"))


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unbuildable(
            "torch was not found at install time (install it first, then use --no-build-isolation)"
        )
    return Path(spec.submodule_search_locations[0])


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(toolkit() / "bin"))


def toolkit() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@dataclass(frozen=True)
class Cutlass:
    """CUTLASS's version and headers, as the package nvidia-cutlass ships them."""

    version: str
    include: Path

    @property
    def flags(self) -> tuple[str, ...]:
        return ("-isystem", str(self.include), *CUTLASS_FLAGS)


def find_cutlass(archs: tuple[str, ...]) -> Cutlass | None:
    """The headers where one of the architectures is Hopper's, or None: then what needs them is left out."""
    spec = importlib.util.find_spec("cutlass_library")
    if HOPPER not in archs or spec is None:
        return None
    for folder in map(Path, spec.submodule_search_locations or ()):
        include = folder / "source" / "include"
        header = include / "cutlass" / "version.h"
        if header.is_file():
            numbers = re.findall(
                r"^#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text(), re.MULTILINE
            )
            return Cutlass(".".join(numbers), include)
    return None


def chosen_archs() -> tuple[str, ...]:
    """FASTVIT_CUDA_ARCHS, "80 90a" say, or those of the GPUs that nvidia-smi lists, or 90a."""
    asked = os.environ.get("FASTVIT_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    for arch in asked:
        if arch not in ARCHS:
            raise Unbuildable(f"FASTVIT_CUDA_ARCHS has {arch!r}; it may have {', '.join(ARCHS)}")
    return tuple(asked) or _present() or ("90a",)


def _present() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        return ()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = (
        {line.strip().replace(".", "") for line in done.stdout.splitlines()}
        if done.returncode == 0
        else set()
    )
    found = {{"86": "80", "87": "80", "90": "90a", "103": "100"}.get(arch, arch) for arch in found}
    return tuple(arch for arch in ARCHS if arch in found)


def built_for(library: Path) -> tuple[tuple[str, ...], str]:
    """The architectures of a CUDA library and its CUTLASS's version; none where there is no library."""
    said = library.read_bytes() if library.is_file() else b""
    found = re.search(BUILT_FOR.format(r"([\w ]+)", r"([\w.]+)").encode(), said)
    return (tuple(found[1].decode().split()), found[2].decode()) if found else ((), "none")


def build_cpu(tools: Tools, work: Path, sanitize: bool = False) -> Path:
    """The CPU library, in the folder ``work``; with AddressSanitizer and UBSan if asked for."""
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") and not sanitize else {"base": ()}
    extra = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g") if sanitize else ()
    multiple = ("-DFASTVIT_LEVELS",) if len(levels) > 1 else ()
    build = _Ninja(work, tools, (*FLAGS, *extra))
    for name in (*SHARED, *CPU):
        build.compile(name, flags=multiple)
    for level, flags in levels.items():
        loops = (*LOOP_FLAGS, *flags, f"-DFASTVIT_LEVEL={level}")
        for name in LOOPS if level != "v4" else LOOPS[:2]:
            build.compile(f"{name}.cpp", output=f"{name}_{level}.o", flags=loops)
    return build.link("_fastvit_cpu.so", (*extra, "-ltorch_cpu", "-lc10"))


def build_cuda(tools: Tools, work: Path, archs: tuple[str, ...], cutlass: Cutlass | None) -> Path:
    """The CUDA library for these architectures; the lowest is there as PTX too, for later GPUs.

    Without CUTLASS it has no product with the activation in its epilogue.
    """
    if tools.nvcc is None:
        raise Unbuildable("nvcc was found neither on PATH nor in CUDA_HOME/bin")
    if not (tools.torch / "lib" / "libtorch_cuda.so").is_file():
        raise Unbuildable("the torch that is installed has no CUDA")
    # A torch that was installed alone has them beside the other one.
    beside = (tools.torch.parent, torch_folder().parent)
    headers = (path for folder in beside for path in sorted(folder.glob("nvidia/cu*/include/cublasLt.h")))
    header = next(headers, None)
    if header is None:
        raise Unbuildable("cublasLt.h is not in the nvidia packages beside torch (pip install nvidia-cublas)")
    cublas = next(iter(sorted((header.parent.parent / "lib").glob("libcublasLt.so.*"))), None)
    if cublas is None:
        raise Unbuildable(f"libcublasLt is not beside {header.parent.parent.name}/include/cublasLt.h")
    build = _Ninja(work, tools, (*FLAGS, "-DFASTVIT_BUILD_CUDA"))
    text = BUILT_FOR.format(" ".join(archs), cutlass.version if cutlass else "none")
    for name in SHARED:
        build.compile(name, flags=(f'-DFASTVIT_BUILT_FOR="{text}"',))
    # nvcc knows where the toolkit's headers are; cuBLASLt's come with torch.
    for path in sorted(CSRC.glob("*cublaslt*.cpp")):
        build.compile(path.name, rule="nvcc", flags=("-isystem", str(header.parent)))
    build.compile("fused_products.cpp", rule="nvcc", flags=cutlass.flags if cutlass else ())
    hopper = set(CSRC.glob(HOPPER_SOURCES))
    for path in sorted(set(CSRC.glob("*.cu")) - hopper):
        build.compile(path.name, rule="nvcc", flags=nvcc_flags(archs))
    if cutlass:
        build.compile("fc1_measured.cpp")
        flags = (*nvcc_flags((HOPPER,)), *cutlass.flags)
        for path in sorted(hopper):
            build.compile(path.name, rule="nvcc", flags=flags, pool="large")
    # nvcc takes no library by its full name, and beside torch there is none without a version in it.
    blas = (f"-L{cublas.parent}", f"-Xlinker=-l:{cublas.name}")
    return build.link("_fastvit_cuda.so", ("-ltorch_cpu", "-ltorch_cuda", "-lc10", *blas), rule="nvlink")


def nvcc_flags(archs: tuple[str, ...]) -> tuple[str, ...]:
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    lowest = min(archs, key=lambda arch: int(arch.rstrip("a")))
    if lowest.isdigit():
        code.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    return tuple(code)


class _Ninja:
    """Collects what to compile, then links it; a failure is the first line that says why."""

    def __init__(self, work: Path, tools: Tools, flags: tuple[str, ...]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.tools, self.objects = work, tools, []
        flags = (*flags, f"-ffile-prefix-map={tools.torch}=torch")
        # nvcc hands what it does not know to the host's compiler only if told to.
        host_only = [flag for flag in flags if flag.startswith(("-f", "-W", "-g"))]
        through = [f"-Xcompiler={flag}" for flag in host_only if flag not in ("-g0", "-Wall", "-Wextra")]
        nvcc = [tools.nvcc or "", *(flag for flag in flags if flag not in host_only), *through, *NVCC_STRICT]
        self.lines = ["pool large", "  depth = 1"]  # some 6 GB each
        for rule, compiler in (("cxx", [tools.cxx, *flags]), ("nvcc", nvcc)):
            command = shlex.join([*compiler, *tools.include])
            self.lines += [f"rule {rule}", f"  command = {command} $flags -MMD -MF $out.d -c $in -o $out"]
            self.lines += ["  depfile = $out.d"]
        folder = f"-L{tools.torch / 'lib'}"
        links = {"link": [tools.cxx, "-shared", folder, "-Wl,--no-undefined"]}
        links["nvlink"] = [tools.nvcc or "", "-shared", "-cudart=static", folder, "-Xlinker=--no-undefined"]
        for rule, linker in links.items():
            self.lines += [f"rule {rule}", f"  command = {shlex.join(linker)} -o $out $in $flags"]

    def compile(
        self, source: str, rule: str = "cxx", output: str = "", flags: tuple[str, ...] = (), pool: str = ""
    ) -> None:
        output = output or f"{source}.o"
        self.lines += [f"build {output}: {rule} {CSRC / source}", f"  flags = {shlex.join(flags)}"]
        self.lines += [f"  pool = {pool}"] if pool else []
        self.objects.append(output)

    def link(self, library: str, flags: tuple[str, ...], rule: str = "link") -> Path:
        objects = " ".join(self.objects)
        self.lines += [f"build {library}: {rule} {objects}", f"  flags = {shlex.join(flags)}", ""]
        (self.work / "build.ninja").write_text("\n".join(self.lines))
        try:
            import ninja
        except ImportError:
            raise Unbuildable("ninja was not found at install time (pip install ninja)") from None
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(self.work), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if re.search(r"\b(error|fatal) *:", line)), lines[-1])
            raise Unbuildable(f"compiling failed at install time: {first.strip()}")
        return self.work / library


def main() -> None:
    """``python csrc/libraries.py FOLDER``: the libraries in a folder, for the tests to load.

    The CUDA library where there is nvcc, and without CUTLASS, whose kernels take minutes.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", type=Path, help="the folder of another torch than the installed one")
    parser.add_argument("--sanitize", action="store_true", help="the CPU library alone, with sanitizers")
    asked = parser.parse_args()
    cxx = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if cxx is None:
        sys.exit("no C++ compiler was found (looked for c++, g++, clang++)")
    try:
        tools = Tools(cxx, (asked.torch or torch_folder()).resolve(), find_nvcc())
        print(build_cpu(tools, asked.folder.resolve(), asked.sanitize))
        if tools.nvcc and not asked.sanitize:
            print(build_cuda(tools, asked.folder.resolve() / "cuda", chosen_archs(), cutlass=None))
    except Unbuildable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
