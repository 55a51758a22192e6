"""attention on a packed projection.

Every provider starts from qkv [B, N, 3 * H * d] and ends with [B, N, H * d], as in a ViT's block: the views
and copies that torch's op needs on the way are part of its time.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import ops, use_backend

from .op_bench import DIRECTIONS, Case, Inputs, Provider, Results, compiled, differentiated
from .op_peers import peers

TOKENS, BATCHES = (50, 197, 257, 577, 1370), (1, 8, 64, 256)
OTHER_HEAD_DIMS = (72, 80, 88, 96, 128)
SDPA = {
    "cuda": {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa math": SDPBackend.MATH,
    },
    "cpu": {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa math": SDPBackend.MATH},
}
# Products of [N, d] by [N, d] matrices: two forward; five backward, one of which is forward's again.
PRODUCTS = {"fwd": 2, "bwd": 5, "step": 7}
# Of q, k, v, out and their gradients, each [B, N, H * d]: what is read, what is written.
PASSES = {"fwd": 3 + 1, "bwd": 3 + 1 + 3, "step": 3 + 1 + 1 + 3}


@dataclass(frozen=True)
class Attention(Case):
    """H heads of d channels on N tokens; of a large batch the first and last image are judged."""

    tokens: int
    heads: int
    head_dim: int
    op = "attention"
    trained = ("qkv",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.heads, self.head_dim

    @property
    def title(self) -> str:
        sizes = f"B={self.batch} N={self.tokens} H={self.heads} d={self.head_dim}"
        return f"attention {self.direction} {self.dtype} {sizes}"

    @property
    def flops(self) -> float:
        return 2 * PRODUCTS[self.direction] * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def bytes_moved(self) -> float:
        elements = self.batch * self.tokens * self.heads * self.head_dim
        return PASSES[self.direction] * elements * self.torch_dtype.itemsize

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        width = self.heads * self.head_dim
        of = partial(torch.randn, generator=generator, device=device, dtype=self.torch_dtype)
        return {"qkv": of(self.batch, self.tokens, 3 * width), "grad": of(self.batch, self.tokens, width)}

    def reference(self, qkv: Tensor) -> Tensor:
        # torch's fused float32 attention multiplies in three tf32 steps, whatever is allowed: no yardstick.
        exact = self.dtype == "tf32" or qkv.dtype == torch.float64
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            return sdpa(qkv, heads=self.heads)

    @torch.no_grad()
    def uncancelled(self, qkv: Tensor, grad: Tensor) -> Results:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.head_dim**-0.5
        weights = (q @ k.mT * scale).softmax(-1)
        q, k, v, grad = (t.abs() for t in (q, k, v, grad.unflatten(-1, (self.heads, -1)).transpose(1, 2)))
        heavy = weights * (q @ k.mT * scale).clamp(min=1)
        out = (heavy @ v).transpose(1, 2).flatten(2)
        if self.direction == "fwd":
            return (out,)
        passed = grad @ v.mT
        logits = heavy * (passed + (passed * weights).sum(-1, keepdim=True)) * scale
        gradients = torch.stack([logits @ k, logits.mT @ q, heavy.mT @ grad], dim=2)
        dqkv = gradients.permute(0, 3, 2, 1, 4).flatten(2)
        return (dqkv,) if self.direction == "bwd" else (out, dqkv)

    def sample(self, tensors: Inputs) -> Inputs:
        return {name: self._ends(tensor) for name, tensor in tensors.items()}

    def sampled(self, results: Results) -> Results:
        return tuple(map(self._ends, results))

    def parts(self, results: Results) -> dict[str, tuple[Tensor, str]]:
        named = {} if self.direction == "bwd" else {"out": (results[0], "op")}
        if self.direction != "fwd":
            dq, dk, dv = results[-1].chunk(3, dim=-1)
            named |= {"dq": (dq, "dq"), "dk": (dk, "op"), "dv": (dv, "op")}
        return named

    @staticmethod
    def _ends(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], tensor[1:][-1:]])


def sdpa(qkv: Tensor, *, heads: int, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def packed_sdpa(qkv: Tensor, *, heads: int) -> Tensor:
    """``sdpa`` without its context managers, for the compiler."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def unfused(qkv: Tensor, *, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def triton(qkv: Tensor, *, heads: int) -> Tensor:
    with use_backend(attention="triton"):
        return ops.attention(qkv, heads)


def cpp(qkv: Tensor, *, heads: int) -> Tensor:
    with use_backend(attention="cpp"):
        return ops.attention(qkv, heads)


def launcher(case: Attention, inputs: Inputs) -> Callable[[], Results]:
    """The kernels without the op around them: no checks, no dispatcher, no autograd."""
    from fastvit_kernels.attention import attention_bwd, attention_fwd

    qkv, grad = inputs["qkv"], inputs["grad"]
    views = qkv.unflatten(-1, (3, case.heads, -1)).unbind(2)
    options = {"scale": case.head_dim**-0.5, "precision": "tf32" if case.dtype == "tf32" else "ieee"}
    if case.direction == "fwd":
        return lambda: attention_fwd(*views, **options)[:1]
    saved = attention_fwd(*views, with_lse=True, **options)
    if case.direction == "bwd":
        return lambda: (attention_bwd(grad, *views, *saved, **options)[0].flatten(2),)

    def step() -> Results:
        out, lse = attention_fwd(*views, with_lse=True, **options)
        return out, attention_bwd(grad, *views, out, lse, **options)[0].flatten(2)

    return step


def providers(case: Attention, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    """Those that need least memory first, and torch's own choice as the baseline."""
    offered = {"sdpa": sdpa}
    offered |= {name: partial(sdpa, backend=backend) for name, backend in SDPA[device.type].items()}
    others, absent = peers(case.op, device)
    offered |= others
    if device.type == "cuda":
        offered["fastvit triton"] = triton
    else:
        absent["fastvit triton"] = "Triton needs a CUDA GPU, and its interpreter's speed means nothing"
        if case.direction == "fwd":
            offered["fastvit cpp"] = cpp
        else:
            absent["fastvit cpp"] = "on a CPU it is for inference"
    offered["unfused"] = unfused
    given = {name: differentiated(partial(forward, heads=case.heads)) for name, forward in offered.items()}
    given["compiled"] = compiled(partial(packed_sdpa, heads=case.heads))
    if device.type == "cuda":
        given["fastvit kernel"] = launcher
    return given, absent


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[Attention]:
    """12 heads of 64 channels, the sizes of a ViT-B, at every length; other head dims at one."""
    if device.type != "cuda":
        sizes = [(1, 50, 64), (1, 197, 64)] if quick else [(b, n, 64) for b in (1, 8) for n in (50, 197, 257)]
    elif quick:
        sizes = [(1, 197, 64), (64, 197, 64), (64, 577, 64), (64, 257, 80)]
    else:
        sizes = [(batch, tokens, 64) for tokens, batch in product(TOKENS, BATCHES)]
        sizes += [(64, 257, head_dim) for head_dim in OTHER_HEAD_DIMS]
    dtypes = dtypes[:1] if quick else dtypes
    for dtype, (batch, tokens, head_dim), direction in product(dtypes, sizes, DIRECTIONS):
        yield Attention(direction, dtype, batch, tokens, 12, head_dim)
