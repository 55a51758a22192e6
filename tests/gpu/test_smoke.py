"""A first look at every op on its kernels: whether it is right, and what it takes beside torch's own.

Each op in a process of its own: ``-n 5 --dist loadgroup``. Times are facts of the tests (``--keep``).
"""

from functools import partial
from itertools import product

import pytest
import torch
from gpu_calls import BACKENDS, FULL, HOPPER, LIBRARY, MODES, NATIVE, OPS, call_of, judged_in, skip_on_a_cpu
from kernel_checks import attention_within_contract, embed_within_contract
from kernel_launches import DEVICE
from native_calls import FIXED, THROUGH
from op_checks import GRADS, gradients_within_contract, within_contract
from served import KERNELS

from fastvit import extension, ops, use_backend
from fastvit.ops import choices

HALF = ("bfloat16", "float16")
WARMUP, RUNS = 3, 20


def forms(op):
    """(form, modes, directions): plain, with the most that the op takes, and in the Hopper kernels' forms."""
    both, modes = ("fwd", "bwd"), (*HALF, "float32")
    yield "plain", modes, both
    if FULL[op]:
        yield "full", modes, both
    if op in ("layer_norm_linear", "layer_norm_mlp"):
        yield "folded", HALF, ("fwd",)
    if op == "layer_norm_mlp":
        yield "fused", HALF, both


def marks(op, form):
    yield pytest.mark.xdist_group(op)
    if op in NATIVE:
        yield HOPPER if form in ("folded", "fused") else LIBRARY


CELLS = [
    pytest.param(op, mode, form, way, marks=tuple(marks(op, form)), id=f"{op} {mode} {form} {way}")
    for op in OPS
    for form, modes, ways in forms(op)
    for mode, way in product(modes, ways)
]


def call_for(op, mode, form):
    call = call_of(op, MODES[mode][0], full=form == "full")
    if call.get("sample_scale") is not None:
        call["sample_scale"] = torch.linspace(0.5, 2, len(call["sample_scale"])).to(call["sample_scale"])
    return call


def judged(op, function, call, mode, way):
    grad = None if way == "fwd" else "contiguous"
    if op not in NATIVE:
        within = attention_within_contract if op == "attention" else embed_within_contract
        with judged_in(mode):
            within(KERNELS, call, grad)
    elif grad is None:
        within_contract(op, call, function)
    else:
        through = {"through": THROUGH.get(op, ()), "without": FIXED, "backward": True}
        gradients_within_contract(op, call, GRADS[grad], **through)


def milliseconds(function):
    for _ in range(WARMUP):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(RUNS):
        function()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) / RUNS, 4)


@pytest.mark.parametrize(("op", "mode", "form", "way"), CELLS)
def test_it_is_right(op, mode, form, way, record_property, request):
    if op in NATIVE:
        skip_on_a_cpu(form in ("folded", "fused") and f"{form} is a GPU's")
        skip_on_a_cpu(mode == "float16" and "the C++ library has no float16")
        skip_on_a_cpu(extension.why_no_ops("cpu"))
    call = call_for(op, mode, form)
    function = partial(getattr(ops, op), **({"frozen": True} if form == "folded" else {}))
    with use_backend(BACKENDS[op]), choices.fusing(form == "fused"), choices.folding(form == "folded"):
        judged(op, function, call, mode, way)
        if way == "bwd" or DEVICE == "cpu" or request.config.getoption("--no-runtime"):
            return
        with torch.no_grad():
            record_property("ms", milliseconds(lambda: function(**call)))
            with use_backend("reference"):
                record_property("torch_ms", milliseconds(lambda: getattr(ops, op)(**call)))
