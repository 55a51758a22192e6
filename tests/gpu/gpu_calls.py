"""Calls of the ops on the device under test, and what they give."""

from collections.abc import Iterator
from contextlib import contextmanager

import op_cases
import pytest
import torch
from kernel_launches import DEVICE, on_device
from op_cases import Call, converted
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import ops, use_backend

NATIVE = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
COMPILED = "cuda" if DEVICE == "cuda" else "cpp"
BACKENDS = {"attention": "triton", "patch_embed": "triton"} | dict.fromkeys(NATIVE, COMPILED)
OPS = tuple(BACKENDS)
LIBRARY, HOPPER = pytest.mark.needs(library=True), pytest.mark.needs(capability=(9, 0), cutlass=True)
EVERY_OP = [pytest.param(op, marks=LIBRARY) if op in NATIVE else op for op in OPS]
# Clock cycles, about 0.1 s: what does not wait is finished long before.
DELAY = 200_000_000
# How an op is computed: a dtype, and the precision of float32 products.
MODES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
# What the kernels give gradients to; of the compiled library's ops, to all but sample_scale.
TRAINED = {
    "attention": ("qkv", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"),
    "patch_embed": ("images", "weight", "bias", "pos_embed", "prefix"),
}
# As in a small ViT on 224 pixels, plain and with the most that a call can have.
SIZES = {
    "attention": {"batch": 4, "tokens": 197, "heads": 3, "head_dim": 64},
    "patch_embed": {"batch": 4, "grid": (14, 14), "patch": (16, 16), "width": 192},
    "layer_norm_linear": {"batch": 4, "tokens": 197, "width": 192, "out": 576},
    "linear_residual": {"batch": 4, "tokens": 197, "width": 192, "inner": 192},
    "layer_norm_mlp": {"batch": 4, "tokens": 197, "width": 192, "hidden": 768},
}
FULL = op_cases.FULL | {"patch_embed": {"images": "uint8", "normalized": "tensors"}}


def skip_on_a_cpu(reason: object) -> None:
    """Skips the test, if there is a reason and this is a CPU: a GPU's lacks are its markers'."""
    if reason and DEVICE == "cpu":
        pytest.skip(str(reason))


def call_of(op: str, dtype: torch.dtype = torch.bfloat16, *, full: bool = False, **sizes) -> Call:
    """Arguments of the public op; always the same numbers."""
    options = SIZES[op] | (FULL[op] if full else {}) | sizes
    return on_device(op_cases.build(op, dtype=dtype, **options))


def given_tensors(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def flipped(call: Call) -> Call:
    """Other numbers of the same shapes."""
    return converted(call, lambda tensor: tensor.flip(-1).contiguous())


def leaves_of(op: str, call: Call) -> dict[str, Tensor]:
    """What the kernels give gradients to, requiring them."""
    names = TRAINED.get(op) or [name for name in given_tensors(call) if name != "sample_scale"]
    return {
        name: call[name].detach().requires_grad_()
        for name in names
        if call.get(name) is not None and call[name].is_floating_point()
    }


def run(op: str, call: Call) -> dict[str, Tensor]:
    """The op on its kernels, as in inference and as in training: outputs and every gradient."""
    function, leaves = getattr(ops, op), leaves_of(op, call)
    with use_backend(BACKENDS[op]):
        with torch.no_grad():
            inferred = function(**call)
        out = function(**call | leaves)
        # Every element its own weight, so that no two gradients agree by chance.
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"inferred": inferred, "out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    unlike = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not unlike, f"other bits in {', '.join(unlike)}"


@contextmanager
def judged_in(mode: str) -> Iterator[tuple[torch.dtype, str]]:
    """The dtype and precision of a mode, torch's own attention being one that keeps to it.

    Its fused float32 attention multiplies in three tf32 steps whatever is allowed: no yardstick for one.
    """
    dtype, precision = MODES[mode]
    if mode in ("bfloat16", "tf32"):
        skip_on_a_cpu(f"{mode} is a GPU's: Triton's interpreter does not compute in it")
    if precision == "ieee":
        yield dtype, precision
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield dtype, precision
