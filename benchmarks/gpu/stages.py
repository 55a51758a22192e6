"""The stages of `make gpu`, by value: what a first run must show comes first.

What is alive, what is right, what ours takes, what torch takes, what `auto` is to go by; then what takes long
or is missed least. Few stages need all of their seconds, which leaves them to the others.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

from . import findings
from .facts import Facts
from .runner import Absent, Command, Stage

BASE, SMALL, LARGE = (f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
REPEATS = (
    "tests/gpu/test_repeats_and_memory.py",
    "tests/gpu/test_large.py",
    "tests/gpu/test_fc1_parity.py::test_the_same_bits_on_every_run_and_with_what_is_saved",
)
SMOKE = "tests/gpu/test_smoke.py"
# Of each op, the words of those cases that are measured first.
OPS = {
    "attention": "B=64 N=197",
    "layer_norm_mlp": "B=64",
    "patch_embed": "B=64 p=16 float",
    "layer_norm_linear": "B=64",
    "linear_residual": "B=64",
}
OUR_KERNELS = ("attention", "patch_embed", "fastvit")  # parts of their names, as the driver has them
UNMEASURED = {"FASTVIT_UNMEASURED": "1"}  # `auto` takes no kernel before there is a table
EAGER, COMPILED, TUNED = "timm eager", "timm compiled", "timm compiled, max-autotune"


def facts(_: Facts) -> list[Command]:
    return [_python("facts", "-m", "fastvit_benchmarks.gpu.facts", "{rows}")]


def tests(name: str, *words: str, workers: int = 8) -> Callable[[Facts], list[Command]]:
    """GPU tests in processes of which a lost context ends one alone. Most of the time goes to compiling."""

    def commands(facts: Facts) -> list[Command]:
        count = os.environ.get("GPU_WORKERS") or str(min(workers, os.cpu_count() or 1))
        parallel = ("-n", count, "--max-worker-restart=1000") if "xdist" in facts.packages else ()
        hang = f"--hang={os.environ.get('GPU_HANG', '30')}"
        how = ("--confcutdir=tests/gpu", "-p", "no:cacheprovider", "--need-gpu", hang, "--keep={logs}")
        return [
            _python(name, "-m", "pytest", "-q", "--tb=short", *how, *parallel, *words, read=findings.tests)
        ]

    return commands


def ops(_: Facts) -> list[Command]:
    return [_bench(f"ops-{op}", "ops", op, "--quick", "--filter", words) for op, words in OPS.items()]


def models(
    name: str, kind: str, *runs: tuple[str, tuple[int, ...]], providers: tuple[str, ...] = (), **env: str
) -> Callable[[Facts], list[Command]]:
    """Of each run a model and its batch sizes, the most important first."""

    def commands(facts: Facts) -> list[Command]:
        if "timm" not in facts.packages:
            raise Absent("timm is not installed: pip install timm")
        chosen = [word for provider in providers for word in ("--provider", provider)]
        tuned = ["--max-autotune"] if TUNED in providers else []
        made = []
        for model, batches in runs:
            sizes = [word for batch in batches for word in ("--batch-size", str(batch))]
            of_run = f"{name}-{model.split('_')[1]}" if len(runs) > 1 else name
            words = (model, *sizes, *chosen, *tuned, "--dtype", "bfloat16")
            made.append(_bench(of_run, kind, *words, env=env))
        return made

    return commands


def tables(facts: Facts) -> list[Command]:
    """What `auto` asks of the three models that are used most, in bfloat16."""
    if "timm" not in facts.packages:
        raise Absent("timm is not installed: pip install timm")
    return [_tuner("tables.measure_gpu", "--points", "{rows}", "--models", "3", "--dtype", "bfloat16")]


def tiles(_: Facts) -> list[Command]:
    return [_tuner("tiles.tune_tiles")]


def sanitizers(*tools: str) -> Callable[[Facts], list[Command]]:
    def commands(facts: Facts) -> list[Command]:
        if not facts.sanitizer:
            raise Absent("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        ours = [word for part in OUR_KERNELS for word in ("--kernel-name", f"kns={part}")]
        how = ("--error-exitcode", "99", "--report-api-errors", "no", *ours)
        calls = (sys.executable, "-m", "fastvit_benchmarks.gpu.sanitized")
        # Freed memory that the allocator keeps is memory in which no access is out of bounds.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Command(tool, (facts.sanitizer, "--tool", tool, *how, *calls), findings.sanitized, env)
            for tool in tools
        ]

    return commands


def _python(name: str, *words: str, **how: object) -> Command:
    return Command(name, (sys.executable, *words), **how)


def _tuner(module: str, *words: str) -> Command:
    limits = ("--seconds", "{seconds}", "--tried", "{tried}")
    return _python(module.partition(".")[2], "-m", f"fastvit_benchmarks.{module}", *limits, *words, again=())


def _bench(name: str, *words: str, **how: object) -> Command:
    argv = ("-m", "fastvit.cli", "bench", *words, "--json", "{rows}")
    return _python(name, *argv, read=findings.kept_rows, again=("--resume",), **how)


_of_ours = partial(models, "ours", "model", (BASE, (256, 1)), **UNMEASURED)
STAGES = (
    Stage("facts", 120, facts, gate=True),
    Stage("smoke", 60, tests("smoke", SMOKE, "--dist=loadgroup", workers=5), gate=True),
    Stage(
        "parity",
        140,
        tests("parity", "tests/gpu", *(f"--deselect={n}" for n in (SMOKE, *REPEATS))),
        gate=True,
    ),
    Stage("ops", 100, ops),
    Stage("ours", 45, _of_ours(providers=(EAGER, "fastvit triton, cuda", "fastvit graphed"))),
    Stage("baseline", 85, models("baseline", "model", (BASE, (256, 1)), providers=(EAGER, COMPILED))),
    Stage("tables", 100, tables),
    Stage("determinism", 60, tests("determinism", *REPEATS, workers=6), gate=True),
    Stage("memcheck", 75, sanitizers("memcheck"), gate=True),
    Stage(
        "model", 150, models("model", "model", (BASE, (256, 1, 64, 8)), (SMALL, (256, 1)), (LARGE, (256, 1)))
    ),
    Stage("train", 90, models("train", "train", (BASE, (256, 8)))),
    Stage("tiles", 150, tiles),
    Stage("sanitizers", 100, sanitizers("racecheck", "initcheck", "synccheck"), gate=True),
    Stage(
        "max-autotune",
        150,
        models("max-autotune", "model", (BASE, (256, 1)), providers=(EAGER, TUNED, "fastvit graphed")),
    ),
)
