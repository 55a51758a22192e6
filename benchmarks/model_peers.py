"""Whole models at inference: torch's ways to run them, ours, and other engines where they are installed.

A provider is prepared from a model of timm, which it may copy and not change, and the first images.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fastvit
from fastvit.backends import TABLE

from . import engines

Call = Callable[[Tensor], Tensor]
Why = Callable[[torch.device, torch.dtype], str | None]


def _anywhere(device: torch.device, dtype: torch.dtype) -> None:
    return None


def _only(kind: str, why: str) -> Why:
    return lambda device, dtype: None if device.type == kind else why


@dataclass(frozen=True)
class Peer:
    """A way to run a model: how it is prepared, and why it cannot be on a device in a dtype."""

    name: str
    prepare: Callable[[nn.Module, Tensor], Call]
    missing: Why = _anywhere


def eager(model: nn.Module, x: Tensor) -> Call:
    return model


def compiled(model: nn.Module, x: Tensor, mode: str | None = None, freezing: bool = False) -> Call:
    """torch.compile, run once so that the compiler is done."""
    with torch._inductor.config.patch(freezing=True) if freezing else nullcontext():
        run = torch.compile(copy.deepcopy(model), mode=mode, dynamic=False)
        run(x)
        run(x)
    return run


def ours(model: nn.Module, x: Tensor) -> nn.Module:
    return fastvit.accelerate(copy.deepcopy(model), mode="inference")


def on_backend(
    model: nn.Module, x: Tensor, prepare: Callable[[nn.Module, Tensor], Call] = ours, **backends: str
) -> Call:
    """Ops by these backends, whatever the table says of their speed; the others as `auto` has them."""
    prepared = prepare(model, x)

    def run(images: Tensor) -> Tensor:
        with fastvit.use_backend(**backends):
            return prepared(images)

    return run


def ours_compiled(model: nn.Module, x: Tensor) -> Call:
    return compiled(ours(model, x), x, freezing=x.device.type == "cpu")


def graphed(model: nn.Module, x: Tensor) -> Call:
    return fastvit.graphed(ours(model, x), batch_sizes=(len(x),))


def _all_of(*names: str) -> dict[str, str]:
    return {op: row.name for op, rows in TABLE.items() for row in rows if row.name in names}


_CPU, _GPU = _only("cpu", "it is for CPUs"), _only("cuda", "it is for CUDA GPUs")
TORCH = (
    Peer("timm eager", eager),
    Peer("timm compiled", compiled),
    Peer("timm compiled, frozen", partial(compiled, freezing=True), _CPU),
)
MAX_AUTOTUNE = Peer("timm compiled, max-autotune", partial(compiled, mode="max-autotune"), _GPU)
OURS = (
    Peer("fastvit", ours),
    Peer("fastvit cpp", partial(on_backend, **_all_of("cpp")), _CPU),
    Peer("fastvit triton", partial(on_backend, **_all_of("triton")), _GPU),
    Peer("fastvit cuda", partial(on_backend, **_all_of("cuda")), _GPU),
    Peer("fastvit triton, cuda", partial(on_backend, **_all_of("triton", "cuda")), _GPU),
    Peer("fastvit graphed", graphed),
    Peer("fastvit cpp graphed", partial(on_backend, prepare=graphed, **_all_of("cpp")), _CPU),
    Peer("fastvit compiled", ours_compiled),
)
ENGINES = (
    Peer("onnxruntime", engines.onnxruntime, engines.why_not_onnxruntime),
    Peer("openvino", engines.openvino, engines.why_not_openvino),
    Peer("torch_tensorrt", engines.tensorrt, engines.why_not_tensorrt),
)
