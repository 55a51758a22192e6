"""`make gpu-pack`: a Triton cache with every launch that GPU tests and benchmarks make, from no GPU.

    python tests/pack_launches.py FOLDER WORK    # FOLDER/triton.tgz of the cache in WORK, by its own Triton

Tests and benchmarks run with a GPU that is made up (fake_gpu); each launch is specialised as Triton's own
binder does where it runs, and compiled for sm_90. Keys hold sources, options, Triton's own files and ptxas's
version, and no path.
"""

import argparse
import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "fake_gpu"), str(TESTS), str(TESTS / "gpu")]
import fake_gpu  # noqa: E402

fake_gpu.install()
import pytest  # noqa: E402
import torch  # noqa: E402
from rich.progress import track  # noqa: E402

CAPABILITY = 90
# Each is run more than once by its tests: a run alone makes the same launches.
DESELECTED = ("test_repeats_and_memory.py", "test_large.py", "test_fc1_parity.py", "test_native_parity.py")
MODELS = [f"vit_{size}_patch16_224" for size in ("base", "small", "large")]
FOUND: dict[str, tuple] = {}


def record(launch) -> None:
    """In the place of a launch: what would be compiled for it, once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    from fastvit_kernels.aot_compile import specialized
    from fastvit_kernels.launch import check_grid

    check_grid(launch.grid)
    if 0 in launch.grid:
        return
    target = GPUTarget("cuda", CAPABILITY, 32)
    source, options = specialized(launch, target)
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    key = get_cache_key(source, backend, parsed, {})
    FOUND.setdefault(hashlib.sha256(key.encode()).hexdigest(), (source, options))


def of_tests() -> None:
    """Every test of tests/gpu that launches, with the reference's numbers."""
    deselected = [f"--deselect=tests/gpu/{name}" for name in DESELECTED]
    how = ["--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--need-gpu", "--no-runtime"]
    if code := pytest.main(["tests/gpu", "-q", *how, *deselected]):
        sys.exit(f"gpu-pack: the GPU tests do not pass with a GPU that is made up (pytest {code})")
    import gpu_calls

    for op in ("attention", "patch_embed"):
        for full in (False, True):
            for sizes in ({"batch": 16}, {}, {"dtype": torch.float32}, {"dtype": torch.float16}):
                gpu_calls.run(op, gpu_calls.call_of(op, full=full, **sizes))
    rest = gpu_calls.call_of("patch_embed")
    for batch in (*range(1, 17), 32):  # of the random shapes; what matters of a size is what divides it
        for tokens in (50, 197, 257, 577):
            qkv = torch.empty(batch, tokens, 3 * 4 * 64, dtype=torch.bfloat16)
            gpu_calls.run("attention", {"qkv": qkv, "num_heads": 4})
        images = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16)
        gpu_calls.run("patch_embed", rest | {"images": images})


def of_benchmarks() -> None:
    """The ops' cases, the tuner's calls, what the sanitizers watch, and models at inference and training."""
    import timm

    import fastvit
    from fastvit import use_backend
    from fastvit_benchmarks.gpu import sanitized
    from fastvit_benchmarks.tiles.calls import calls

    device = torch.device("cuda")
    for op in ("attention", "patch_embed"):
        bench = import_module(f"fastvit_benchmarks.bench_{op}")
        for case in bench.cases(device, True, ("bfloat16",)):
            given, _ = bench.providers(case, device)
            inputs = case.inputs(0, device)
            for name, provider in given.items():
                if name.startswith("fastvit"):
                    provider(case, inputs)()
    for call in calls():
        for launch in call.plan(call.without_data(), f"sm_{CAPABILITY}")[0]:
            launch()
    sanitized.main(device="cuda")
    for name in MODELS:
        for batch in (1, 8):
            for training in (False, True):
                model = timm.create_model(name, depth=1, img_size=224)
                model = fastvit.accelerate(model, mode="train" if training else "inference")
                model = model.to(torch.bfloat16).train(training)
                x = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16)
                with use_backend("triton"), torch.set_grad_enabled(training):
                    out = model(x)
                    if training:
                        torch.autograd.grad(out.float().sum(), list(model.parameters()), allow_unused=True)


def compiled(key: str) -> str:
    """In a process of its own: why it does not compile, or ""."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = FOUND[key]
    try:
        triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    except Exception as error:  # whatever a compiler raises is the finding
        return f"{source.name}: {str(error).splitlines()[0]}"
    return ""


def launchers() -> int:
    """The C code by which Triton 3.6 calls each kernel, built against a stand-in for libcuda."""
    from triton import knobs
    from triton.backends.nvidia import driver

    texts = [Path(driver.dirname, name).read_text() for name in ("driver.c", "driver.py")]
    # Every function that they name, or the linker leaves libcuda out of what they need.
    names = sorted({name for text in texts for name in re.findall(r"\bcu[A-Z]\w+", text)})
    stub = Path(tempfile.mkdtemp())
    (stub / "stub.c").write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    library = stub / "libcuda.so.1"
    words = ["-shared", "-fPIC", "-fno-builtin", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.check_call(["gcc", *words, str(stub / "stub.c")])
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(stub)
    driver.CudaUtils()
    if not hasattr(driver, "make_launcher"):
        return 1
    for source, _ in track(list(FOUND.values()), "launchers", transient=True):
        driver.CudaLauncher(
            source,
            argparse.Namespace(
                global_scratch_size=0,
                global_scratch_align=1,
                profile_scratch_size=0,
                profile_scratch_align=1,
                launch_cooperative_grid=False,
                launch_pdl=False,
            ),
        )
    return len(FOUND)


def main() -> None:
    folder, work = map(Path, sys.argv[1:])
    from fastvit_benchmarks.gpu.facts import triton_key
    from fastvit_benchmarks.gpu.runner import environment
    from fastvit_benchmarks.machine import sources

    os.environ |= environment()
    os.environ["TRITON_CACHE_DIR"] = str((work / "triton").absolute())
    from fastvit_kernels import launch

    launch.Launch.__call__ = record
    of_tests()
    of_benchmarks()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        jobs = track(pool.map(compiled, FOUND), f"compiling {len(FOUND)} kernels", len(FOUND))
        faults = [fault for fault in jobs if fault]
    print(*faults, f"{len(FOUND)} kernels, {len(faults)} do not compile, {launchers()} launchers", sep="\n")
    (folder / "triton_key").write_text(triton_key() + "\n")
    (folder / "sources").write_text(sources() + "\n")
    with tarfile.open(folder / "triton.tgz", "w:gz") as tar:
        keep = lambda info: None if info.name.endswith((".ttgir", ".llir", ".source", ".ttir")) else info  # noqa: E731
        tar.add(work / "triton", ".", filter=keep)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
