"""The stages of `make gpu`, in order.

A kernel that is wrong is not worth a time, so parity comes before anything that is timed. Then the baseline,
before tuning may use up the time: timm eager, the compiler and ours as shipped are the numbers that all else
is compared with. `auto` goes by the tables, which measure the tiles: tiles, then tables, then what is
measured with both. Last is what takes long and is missed least.
"""

import os
import sys
from collections.abc import Callable

from . import findings
from .preflight import HOPPER, Facts
from .stage_runner import Absent, Already, Command, Stage

BASE, SMALL, LARGE = (f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
TESTS = ("-m", "pytest", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-rs", "--need-gpu")
REPEATS = "tests/gpu/test_repeats_and_memory.py"
FC1_REPEATS = "tests/gpu/test_fc1_parity.py::test_the_same_bits_on_every_run_and_with_what_is_saved"
TILED = ("tests/gpu/test_attention_parity.py", "tests/gpu/test_patch_embed_parity.py")
OPS = ("attention", "layer_norm_mlp", "layer_norm_linear", "linear_residual", "patch_embed")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUR_KERNELS = ("attention", "patch_embed", "fastvit")  # parts of their names, as the driver has them


def build(facts: Facts) -> list[Command]:
    if facts.library is None:
        raise Already(f"the library for sm_{facts.arch} is there")
    env = {"FASTVIT_CUDA": "1", "FASTVIT_CUDA_ARCHS": facts.arch}
    load = "from fastvit.extension import *; load_ops('cuda'); print(build_info())"
    return [
        Command("setup", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), env=env, weight=20),
        Command("load", (sys.executable, "-c", load)),
    ]


def parity(facts: Facts) -> list[Command]:
    """All but what has a stage of its own, and what this machine cannot show, which is left out by name."""
    left_out = [REPEATS, FC1_REPEATS]
    if facts.gpus < 2:
        left_out.append("tests/gpu/test_streams_and_graphs.py::test_runs_on_the_gpu_of_its_tensors")
    if facts.capability != HOPPER:
        left_out.append("tests/gpu/test_fc1_parity.py")
    if facts.total < 40:
        left_out += [f"tests/gpu/test_large.py::test_{op}" for op in ("attention", "patch_embed")]
    return [_pytest("parity", facts, "tests/gpu", *(f"--deselect={name}" for name in left_out))]


def determinism(facts: Facts) -> list[Command]:
    return [_pytest("determinism", facts, REPEATS, *([FC1_REPEATS] if facts.capability == HOPPER else []))]


def parity_of_tiles(facts: Facts) -> list[Command]:
    return [_pytest("parity-of-tiles", facts, *TILED)]


def _pytest(name: str, facts: Facts, *words: str) -> Command:
    # Most of the time goes to compiling kernels.
    workers = os.environ.get("GPU_WORKERS") or str(max(2, min(8, (os.cpu_count() or 2) // 2)))
    parallel = ("-n", workers) if "xdist" in facts.packages else ()
    return Command(name, (sys.executable, *TESTS, *parallel, *words), findings.tests)


def sanitizers(facts: Facts) -> list[Command]:
    if facts.sanitizer is None:
        raise Absent("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    ours = [word for part in OUR_KERNELS for word in ("--kernel-name", f"kns={part}")]
    calls = (sys.executable, "-m", "fastvit_benchmarks.gpu.sanitized")
    # Freed memory that the allocator keeps is memory in which no access is out of bounds.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(
            tool,
            (facts.sanitizer, "--tool", tool, "--error-exitcode", "99", *ours, *calls),
            findings.sanitized,
            env,
        )
        for tool in SANITIZERS
    ]


def tiles(facts: Facts) -> list[Command]:
    return [_tuner("tiles.tune_tiles", "--commit", facts.state.commit)]


def tables(facts: Facts) -> list[Command]:
    _need_timm(facts)
    again = ("--fresh",) if facts.fresh else ()
    return [_tuner("tables.measure_gpu", "--points", "{rows}", "--state", facts.state.sources, *again)]


def _tuner(module: str, *words: str) -> Command:
    return Command(
        module, (sys.executable, "-m", f"fastvit_benchmarks.{module}", "--seconds", "{seconds}", *words)
    )


def ops(facts: Facts) -> list[Command]:
    return [_bench(f"ops-{op}", "ops", op, "--quick") for op in OPS]


def of_models(
    name: str, *runs: tuple[str, str, tuple[str, ...], tuple[int, ...]]
) -> Callable[[Facts], list[Command]]:
    """A stage's commands: for each run the kind of benchmark, models, batches, and options before them."""

    def commands(facts: Facts) -> list[Command]:
        _need_timm(facts)
        made = []
        for kind, part, words, batches in runs:
            sizes = [word for batch in batches for word in ("--batch-size", str(batch))]
            of_run = f"{name}-{part}" if part else name
            made.append(_bench(of_run, kind, *words, *sizes, "--dtype", "bfloat16"))
        return made

    return commands


def _bench(name: str, *words: str) -> Command:
    argv = (sys.executable, "-m", "fastvit.cli", "bench", *words, "--json", "{rows}")
    return Command(name, argv, findings.kept_rows)


def _need_timm(facts: Facts) -> None:
    if "timm" not in facts.packages:
        raise Absent("timm is not installed: pip install timm")


AUTOTUNE = "--max-autotune"
# Seconds as an H100 should need at most. They add up to more than LIMIT: few stages need all of theirs, and
# what was not reached is where the next run goes on.
STAGES = (
    Stage("build", 300, build, gate=True),
    Stage("parity", 300, parity, gate=True),
    Stage("determinism", 60, determinism, gate=True),
    Stage("baseline", 75, of_models("baseline", ("model", "", (BASE,), (1, 256)))),
    Stage("sanitizers", 100, sanitizers, gate=True),
    Stage("tiles", 150, tiles),
    Stage("parity-of-tiles", 90, parity_of_tiles, gate=True),
    Stage("tables", 150, tables),
    Stage(
        "model",
        150,
        of_models(
            "model", ("model", "base", (BASE,), (1, 8, 64, 256)), ("model", "rest", (SMALL, LARGE), (1, 256))
        ),
    ),
    Stage("train", 90, of_models("train", ("train", "", (BASE,), (256, 8)))),
    Stage("ops", 150, ops),
    Stage("compare", 120, of_models("compare", ("compare", "", (BASE,), (1, 256)))),
    Stage(
        "max-autotune",
        300,
        of_models(
            "max-autotune",
            ("model", "inference", (BASE, AUTOTUNE), (1, 256)),
            ("train", "training", (BASE, AUTOTUNE), (256,)),
        ),
    ),
)
