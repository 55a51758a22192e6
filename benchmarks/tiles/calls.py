"""The calls that tiles are chosen by: a kernel's launches on a ViT's shapes, most important first.

Each is judged and timed as an op is, but launched directly: what a call costs on the host says nothing of a
tile.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit_kernels.tiles import dtype_class, place

from ..op_bench import Inputs
from ..recorded import Recorded
from ..roofline import DTYPES
from .plans import PLANS, Planned

SIDE, PATCH = 224, 16
ATTENTION = ("attention_fwd", "attention_bwd_keys", "attention_bwd_queries")


@dataclass(frozen=True)
class TileCall(Recorded):
    """A call of one kernel, which the tables know by the name ``kernel``."""

    kernel: str = ""

    def reference(self, **inputs: Tensor) -> Tensor:
        # torch's fused float32 attention multiplies in three tf32 steps, whatever is allowed: no yardstick.
        with sdpa_kernel(SDPBackend.MATH) if self.dtype == "tf32" else nullcontext():
            return super().reference(**inputs)

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def sizes(self) -> dict[str, int]:
        """By which the tables choose."""
        kinds = dict(self.tensors)
        if self.op == "attention":
            batch, tokens, width = kinds["qkv"].shape
            heads = dict(self.options)["num_heads"]
            return {"head_dim": width // 3 // heads, "tokens": tokens, "load": int("rope_cos" in kinds)}
        batch, _, height, width = kinds["images"].shape
        return {"tokens": batch * (height // PATCH) * (width // PATCH)}

    @property
    def dtype_class(self) -> str:
        return dtype_class(self.torch_dtype, self.precision)

    def place(self, arch: str) -> int:
        """Which of the kernel's entries serves it."""
        return place(self.kernel, arch, self.dtype_class, **self.sizes)

    def without_data(self) -> Inputs:
        """``inputs`` on the meta device, to plan launches by."""
        given = {
            name: torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device="meta")
            for name, kind in self.tensors
        }
        return given | {"grad": self.reference(**given)}

    def plan(self, inputs: Inputs, arch: str) -> Planned:
        """What is launched with the tiles that the table has now, and where the results will be."""
        return PLANS[self.kernel](inputs | dict(self.options), self.precision, arch)


def attention_call(
    kernel: str, dtype: str, batch: int, tokens: int, heads: int, head_dim: int, rotated: bool = False
) -> TileCall:
    """Plain, or with rotary positions, which take registers as masks and norms do."""
    direction = "fwd" if kernel == "attention_fwd" else "bwd"
    qkv = _meta(batch, tokens, 3, heads, head_dim, dtype=dtype, trained=direction == "bwd")
    options: dict[str, Any] = {}
    if rotated:
        options = {name: _meta(tokens - 1, head_dim, dtype="float32") for name in ("rope_cos", "rope_sin")}
        options |= {"rope_layout": "half", "num_prefix_tokens": 1}
    made = Recorded.of("attention", qkv.unbind(2), options, direction, dtype)
    return TileCall(**vars(made), kernel=kernel)


def patch_embed_call(kernel: str, dtype: str, batch: int, width: int, side: int = SIDE) -> TileCall:
    """Of floats in the order that torch has them, with bias, positions and a class token."""
    patches, direction = (side // PATCH) ** 2, "fwd" if kernel == "patch_embed_fwd" else "bwd"
    images = _meta(batch, 3, side, side, dtype=dtype, trained=kernel == "patch_embed_dimages")
    weight = _meta(width, 3, PATCH, PATCH, dtype=dtype, trained=kernel == "patch_embed_dweight")
    rest = [_meta(*size, dtype=dtype) for size in ((width,), (1, 1 + patches, width), (1, 1, width))]
    made = Recorded.of("patch_embed", (images, weight, *rest), {}, direction, dtype)
    return TileCall(**vars(made), kernel=kernel)


def _meta(*size: int, dtype: str, trained: bool = False) -> Tensor:
    return torch.empty(size, dtype=DTYPES[dtype], device="meta", requires_grad=trained)


def calls() -> Iterator[TileCall]:
    """Of ViT-S, -B and -L first, then what fewer models have: other lengths, rotary positions, wide heads."""
    half = "bfloat16"
    for kernel in ATTENTION:
        for batch, heads in ((64, 12), (1, 12), (256, 6), (8, 16)):
            yield attention_call(kernel, half, batch, 197, heads, 64)
        yield attention_call(kernel, half, 64, 257, 12, 64)
    for kernel, (batch, width) in product(PLANS, ((64, 768), (1, 768), (8, 1024), (256, 384))):
        if kernel in ("patch_embed_fwd", "patch_embed_dweight"):
            yield patch_embed_call(kernel, half, batch, width)
    lengths = ((64, 197, 12), (1, 197, 12), (256, 197, 6), (8, 197, 16), (256, 50, 12), (64, 257, 12))
    for batch, tokens, heads in lengths:
        yield attention_call("attention_bwd_heads", half, batch, tokens, heads, 64)
    for kernel in ATTENTION:
        yield attention_call(kernel, half, 16, 577, 12, 64)
        yield attention_call(kernel, half, 64, 197, 12, 64, rotated=True)
        yield attention_call(kernel, half, 64, 257, 16, 72)
        yield attention_call(kernel, half, 64, 257, 8, 96)
        yield attention_call(kernel, half, 64, 257, 8, 128)
    yield attention_call("attention_fwd", half, 64, 257, 8, 128, rotated=True)
    yield patch_embed_call("patch_embed_dimages", half, 64, 768)
    for dtype in ("tf32", "float32"):
        for kernel in ATTENTION:
            yield attention_call(kernel, dtype, 64, 197, 12, 64)
        for kernel in ("patch_embed_fwd", "patch_embed_dweight"):
            yield patch_embed_call(kernel, dtype, 64, 768)
