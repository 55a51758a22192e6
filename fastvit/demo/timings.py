"""Milliseconds per image: timm as it comes, timm compiled, and fastvit, in interleaved rounds."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from torch import Tensor, nn

from .parity import NO_TIMM
from .result import TimingRow

WARMUP = 3
EAGER, COMPILED, FASTVIT = "timm, eager", "timm, torch.compile", "fastvit"


def batches(images: Tensor, batch_size: int) -> list[Tensor]:
    """As many different batches as there are images, each starting one further on."""
    turns = (torch.arange(start, start + batch_size) % len(images) for start in range(len(images)))
    return [images[turn.to(images.device)].contiguous() for turn in turns]


@torch.inference_mode()
def compiled_or_reason(model: nn.Module, example: Tensor, mode: str | None = None) -> Callable | str:
    """The model after torch.compile and a first call, or in words why there is none.

    On a CPU torch.compile needs a C++ compiler, and on a GPU Triton: a demo should not die of that.
    """
    with _without_warnings():
        try:
            compiled = torch.compile(model, mode=mode)
            compiled(example)
        except Exception as error:  # dynamo, inductor and the compiler each raise their own
            return f"cannot compile: {_in_words(error)}"
    return compiled


@torch.inference_mode()
def timing_rows(
    model: nn.Module,
    timm_model: nn.Module | None,
    compiled: Callable | str | None,
    inputs: list[Tensor],
    rounds: int,
    on_round: Callable[[], object] | None = None,
) -> list[TimingRow]:
    """One row for each of timm, compiled timm (or the reason why not) and fastvit.

    Args:
        inputs: batches on the models' device and in their dtype, fed in turn.
        rounds: how often each is run; the rows hold medians.
    """
    from fastvit_benchmarks.harness import measure, ratios, rotating

    absent = {EAGER: NO_TIMM, COMPILED: NO_TIMM} if timm_model is None else {}
    if isinstance(compiled, str):
        absent[COMPILED] = compiled
    calls = {EAGER: timm_model, COMPILED: compiled, FASTVIT: model}
    providers = {name: rotating(call, inputs) for name, call in calls.items() if name not in absent}
    timings = measure(providers, rounds=rounds, warmup=WARMUP, device=inputs[0].device, on_round=on_round)
    speedups = ratios(timings, EAGER) if EAGER in timings else {}
    per_image = 1 / inputs[0].shape[0]
    return [
        TimingRow(name, note=absent[name])
        if name in absent
        else TimingRow(
            name,
            timings[name].p50 * per_image,
            timings[name].p20 * per_image,
            timings[name].p80 * per_image,
            speedups.get(name),
        )
        for name in calls
    ]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What torch logs and warns of while it compiles is no news, and would break up the progress bar."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _in_words(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip() or type(error).__name__
    if "InvalidCxxCompiler" in text:
        return "no working C++ compiler was found"
    return shorten(text.splitlines()[0], 90, placeholder=" ...")
