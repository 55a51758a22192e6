"""Calls of the launchers that differ, each in one thing, and what takes the place of Triton's compiler."""

from contextlib import contextmanager
from unittest import mock

import torch
from triton.compiler import CompiledKernel

from fastvit_kernels import attention, launch_cache
from fastvit_kernels.attention_options import Options
from fastvit_kernels.launch import Launch

TOKENS, HEADS, DIM = 5, 2, 16


@contextmanager
def uncompiled():
    """Launches, noted in the place of being compiled, and what their compiled kernels are run with later."""
    planned, repeated = [], []

    def launched(launch):
        planned.append(launch)
        kernel = object.__new__(CompiledKernel)
        kernel.module, kernel.function, kernel.packed_metadata = None, id(launch), ("packed",)
        kernel._run = lambda *given: repeated.append((launch, given))
        return kernel

    with mock.patch.object(Launch, "__call__", launched):
        yield planned, repeated


def tensors(dtype=torch.float16, tokens=TOKENS, batch=1):
    qkv = torch.zeros(batch, tokens, 3, HEADS, DIM, dtype=dtype)
    out = torch.zeros(batch, tokens, HEADS * DIM, dtype=dtype)
    return {**dict(zip("qkv", qkv.unbind(2), strict=True)), "out": out, "lse": None}


def forward(options=None, arch="sm_90", **given):
    given = {**tensors(), **given}
    launch_cache.run(attention.plan_fwd, *given.values(), options or Options(0.25), arch)


def expected(launch: Launch) -> list:
    """The kernel's arguments in order, tensors as their addresses."""
    given = launch.args | launch.constants
    values = [given[name] for name in launch.kernel.arg_names]
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]


def norm(fill=0.0, dtype=torch.float16):
    return torch.full((DIM,), fill, dtype=dtype)


NORMED = {"qk_norm": "layer_norm", "q_norm_weight": norm(), "k_norm_weight": norm()}
ROTARY = {"rope_cos": torch.zeros(TOKENS, DIM), "rope_sin": torch.zeros(TOKENS, DIM)}
# For each option two of its values, beside others that it needs.
OPTIONS = {
    "scale": [{"scale": 0.25}, {"scale": 0.5}],
    "attn_mask": [
        {},
        {"attn_mask": torch.zeros(TOKENS, TOKENS, dtype=torch.bool)},
        {"attn_mask": torch.zeros(TOKENS, TOKENS)},
        {"attn_mask": torch.zeros(TOKENS, TOKENS, dtype=torch.float16)},
        {"attn_mask": torch.zeros(TOKENS, TOKENS).mT},
        {"attn_mask": torch.zeros(1, HEADS, TOKENS, TOKENS)},
    ],
    "key_mask": [{}, {"key_mask": torch.ones(1, TOKENS, dtype=torch.bool)}],
    "qk_norm": [{}, {"qk_norm": "layer_norm"}, {"qk_norm": "rms_norm"}],
    "q_norm_weight": [NORMED, NORMED | {"q_norm_weight": None}, NORMED | {"q_norm_weight": norm().float()}],
    "q_norm_bias": [NORMED, NORMED | {"q_norm_bias": norm()}],
    "k_norm_weight": [NORMED, NORMED | {"k_norm_weight": None}],
    "k_norm_bias": [NORMED, NORMED | {"k_norm_bias": norm()}],
    "qk_norm_eps": [NORMED | {"qk_norm_eps": 1e-5}, NORMED | {"qk_norm_eps": 1e-6}],
    "rope_cos": [{}, ROTARY, {name: table.half() for name, table in ROTARY.items()}],
    "rope_sin": [ROTARY, ROTARY | {"rope_sin": torch.zeros(1, 1, TOKENS, DIM).expand(1, HEADS, -1, -1)}],
    "rope_layout": [ROTARY | {"rope_layout": layout} for layout in ("half", "interleaved")],
    "num_prefix_tokens": [
        {name: torch.zeros(TOKENS - n, DIM) for name in ROTARY} | {"num_prefix_tokens": n} for n in (0, 1)
    ],
    "precision": [{"precision": "ieee"}, {"precision": "tf32"}],
}


def shifted(tensor, by):
    """The same numbers, so many elements behind a multiple of 16 bytes."""
    memory = torch.zeros(tensor.numel() + 32, dtype=tensor.dtype)
    start = -memory.data_ptr() % 16 // memory.element_size() + by
    return memory[start : start + tensor.numel()].view(tensor.shape)


base = tensors()
OTHERS = {
    "dtype": {**tensors(torch.bfloat16)},
    "tokens": {**tensors(tokens=TOKENS + 1)},
    "batch": {**tensors(batch=2)},
    "strides": {"v": torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.float16)},
    "lse": {"lse": torch.zeros(1, HEADS, TOKENS)},
    "arch": {"arch": "sm_80"},
    "alignment": {"out": shifted(base["out"], 1)},
    "alignment of another": {"out": shifted(base["out"], 2)},
}
