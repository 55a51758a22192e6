"""What stands in the place of a GPU, so that all that runs before its first kernel can be tried without one.

torch says that there is an H100, and what is to be on it lies on the CPU. Launches are planned for sm_90,
checked, and noted in the file that FAKE_GPU_LAUNCHES names; the numbers are the reference's. Models and
benchmarks are small, and nothing is compiled. FAKE_GPU_PLANT="attention_bwd=die" (or "hang", "wrong",
"lost") plants a fault in a launcher: the process ends, waits for ever, gives other numbers, or has every
later call of CUDA fail, as after an illegal address.
"""

import contextlib
import dataclasses
import os
import sys
import time
from importlib.abc import MetaPathFinder
from types import SimpleNamespace

NAME = "NVIDIA H100 80GB FAKE"
PLANTED = dict(part.split("=") for part in os.environ.get("FAKE_GPU_PLANT", "").split(",") if part)
SLOWER = float(os.environ.get("FAKE_GPU_SLOWER", "1"))  # by so much stages have more seconds
PATIENCE = float(os.environ.get("FAKE_GPU_PATIENCE", "60"))  # seconds that a benchmark waits for a call
MEMORY = 80e9
_lost = []


# What is to be changed of a module, by its name, as soon as it has been imported.
CHANGED = {
    "torch": "cuda",
    "timm.models": "small_models",
    "fastvit.extension": "library",
    "fastvit.triton_backend": "triton_backend",
    "fastvit.native_backend": "native_backend",
    "fastvit.backends": "library_calls",
    "fastvit.ops": "library_ops",
    "fastvit.layers.direct": "decided_each_time",
    "fastvit_kernels.launch": "launches",
    "fastvit_kernels.attention": "attention",
    "fastvit_kernels.patch_embed": "patch_embed",
    "fastvit_benchmarks.bench_ops": "small_cases",
    "fastvit_benchmarks.attempts": "impatient",
    "fastvit_benchmarks.harness": "few_rounds",
    "fastvit_benchmarks.gpu_timing": "small_flush",
    "fastvit_benchmarks.op_bench": "few_inputs",
    "fastvit_benchmarks.gpu.stages": "long_stages",
    "fastvit_benchmarks.roofline": "small_limits",
    "fastvit_benchmarks.tables.gpu_questions": "few_questions",
}


class Finder(MetaPathFinder):
    """Finds these modules as the others are found, and hands each to this module's function for it."""

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGED:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                break
        if spec is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import fake_kernels

            change = CHANGED.pop(name)
            getattr(fake_kernels, change, globals().get(change))(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """From here on, for whatever is imported next."""
    if not isinstance(sys.meta_path[0], Finder):
        sys.meta_path.insert(0, Finder())


def synchronize(device=None):
    if _lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def planted(launcher, results):
    """The results, with what is planted in the launcher."""
    match PLANTED.get(launcher):
        case "die":
            os._exit(139)
        case "hang":
            time.sleep(1e6)
        case "lost":
            _lost.append(launcher)
            synchronize()
        case "wrong":
            results[0].mul_(1.5)
    return results


def cuda(torch):
    """torch with a GPU whose memory is the host's."""
    from torch.overrides import TorchFunctionMode

    facts = SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=int(MEMORY))
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": facts,
        "mem_get_info": (int(MEMORY), int(MEMORY)),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "manual_seed_all": None,
        "is_current_stream_capturing": False,
        "current_stream": None,
        "Stream": None,
        "stream": contextlib.nullcontext(),
        "_sleep": None,
        "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.accelerator.is_available = lambda: False
    from fake_time import Event, Graph, capture

    torch.cuda.synchronize, torch.cuda.Event = synchronize, Event
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.version.cuda = "13.0"

    def on_host(value):
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value

    class OnHost(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.device:  # a device is what it says; what is put there is not
                return function(*args, **kwargs or {})
            return function(*map(on_host, args), **{k: on_host(v) for k, v in (kwargs or {}).items()})

    OnHost().__enter__()

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    torch.Generator = Generator
    torch.compile = lambda model=None, **_: model if model is not None else torch.compile


def small_models(models):
    """timm's, of one block and few patches, unless the caller says how large."""
    create = models.create_model

    def create_model(name, *args, **options):
        side = 28 if "patch14" in name else 32
        small = {} if "img_size" in options else {"img_size": side}
        model = create(name, *args, **{"depth": 1} | small | options)
        if small:
            model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, side, side))
        return model

    models.create_model = create_model


def small_cases(bench_ops):
    cases = bench_ops.cases

    def of_few(*args):
        chosen = [(case, given) for case, given in cases(*args) if case.direction != "step"]
        return [(dataclasses.replace(case, batch=min(2, case.batch)), given) for case, given in chosen]

    bench_ops.cases = of_few


def few_rounds(harness):
    measure = harness.measure

    def measure_little(providers, **how):
        return measure(providers, **how | {"rounds": 2, "warmup": 1, "min_seconds": 0.0})

    harness.measure = measure_little


def small_flush(gpu_timing):
    gpu_timing._FLUSH_BYTES = 1024


def few_inputs(op_bench):
    op_bench.GPU_SETS = 1


def impatient(attempts):
    attempts.SECONDS = attempts.COMPILING = PATIENCE


def small_limits(roofline):
    roofline.COPIED["cuda"], roofline.PRODUCT["cuda"] = 1 << 20, (64, 64, 64)


def long_stages(stages):
    of_cpu = (dataclasses.replace(stage, seconds=SLOWER * stage.seconds) for stage in stages.STAGES)
    stages.STAGES = tuple(of_cpu)


def few_questions(gpu_questions):
    gpu_questions.BATCHES, gpu_questions.FUSED_WIDTHS = (1, 2), (384,)


def library(extension):
    """The CUDA library, as if it were built; what it would compute is the reference's."""
    why = extension.why_no_ops
    extension.why_no_ops = lambda device: None if device == "cuda" else why(device)
    facts = {"version": "0", "compiler": "none", "cxx_standard": 201703, "torch": "0", "cuda": "1"}
    extension.build_info = lambda: extension.BuildInfo(**facts, cuda_archs=("90a",), cutlass="4.2.0")


def triton_backend(backend):
    backend._machine = lambda tensor: None


def native_backend(backend):
    can_run = backend.can_run
    backend.can_run = lambda op, device, *args, **how: (
        None if device == "cuda" else can_run(op, device, *args, **how)
    )


def library_calls(backends):
    resolve = backends.resolve

    def resolved(op, *args, **how):
        name = resolve(op, *args, **how)
        return "reference" if name == "cuda" else name

    backends.resolve = resolved


def decided_each_time(direct):
    """The library's own kernels, which a block would call directly, are not there."""
    direct._kind = lambda *_: None


def library_ops(ops):
    """Those of the library, where it is asked for by name: as its kernels do, they round once, at the end."""
    from fastvit import backends

    def wide(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(wide, value))
        return value.float() if getattr(value, "is_floating_point", bool)() else value

    def rounded(op, function):
        def called(x, *args, **how):
            if backends.requested(op) != "cuda":
                return function(x, *args, **how)
            with backends.use_backend("reference"):
                out = function(
                    wide(x), *map(wide, args), **{name: wide(value) for name, value in how.items()}
                )
            return out.to(x.dtype)

        return called

    for op in ("layer_norm_linear", "linear_residual", "layer_norm_mlp"):
        setattr(ops, op, rounded(op, getattr(ops, op)))
