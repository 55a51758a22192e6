"""What a block costs the CPU before anything runs: its Python, beside that of timm's own block.

    fastvit bench host

No GPU takes part. Products, norms and SDPA are stubs that return tensors made before, Triton's kernels are
compiled for sm_90 and never run: what is left is Python and the tensors that it makes. Times are CPU time of
this thread, the least of many, so that a busy machine changes them little.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .no_gpu import no_gpu

ROUNDS, CALLS = 300, 20
MODEL = "vit_tiny_patch16_224"
BLOCKS = ("block", "block, frozen weights")
BACKENDS = {
    "attention": "triton",
    "patch_embed": "triton",
    "layer_norm_linear": "cpp",
    "linear_residual": "cpp",
    "layer_norm_mlp": "cpp",
}


class Row(NamedTuple):
    """A part by name: microseconds of it and, where there is one, of timm's."""

    part: str
    ours: float
    timm: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.timm is None else self.ours / self.timm


def least(call: Callable[[], Any], rounds: int = ROUNDS, calls: int = CALLS) -> float:
    """Microseconds of this thread that a call takes, the least of many rounds."""
    times = range(calls)
    for _ in times:
        call()
    best = float("inf")
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            start = time.thread_time_ns()
            for _ in times:
                call()
            best = min(best, time.thread_time_ns() - start)
    finally:
        if collects:
            gc.enable()
    return best / calls / 1e3


def calls_of(call: Callable[[], Any]) -> int:
    """Python functions that a call enters once it is known: a count, the same on every machine."""
    for _ in range(3):
        call()
    count = 0

    def entered(frame, event, _):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def stubs(blocks: nn.Module, x: Tensor) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Of a model's blocks for tokens x: torch.nn.functional's by name, and the library's ops."""
    made: dict[tuple[int, ...], Tensor] = {}
    for layer in blocks.modules():
        if isinstance(layer, nn.Linear):
            made[layer.weight.shape] = x.new_zeros(*x.shape[:-1], layer.weight.shape[0])
    heads = blocks[0].attn.num_heads
    attended = x.new_zeros(x.shape[0], heads, x.shape[1], x.shape[2] // heads)
    like, nothing = torch.zeros_like(x), []
    functional = {
        "linear": lambda x, weight, bias=None: made[weight.shape],
        "layer_norm": lambda x, *_: like,
        "gelu": lambda x, **_: x,
        "scaled_dot_product_attention": lambda *_, **__: attended,
    }
    library = {
        "layer_norm_linear_fwd": lambda x, nw, nb, weights, *_: (made[weights[0].shape], nothing),
        "linear_residual_fwd": lambda *_: (like, nothing),
        "layer_norm_mlp_fwd": lambda *_: (like, nothing),
    }
    return functional, library


class Setting(NamedTuple):
    """timm's model and the same of ours in its two modes, and what they take."""

    timm: nn.Module
    default: nn.Module
    frozen: nn.Module
    images: Tensor
    x: Tensor


def setting() -> Setting:
    import timm

    import fastvit

    made = []
    for mode in (None, "train", "inference"):
        torch.manual_seed(0)
        model = timm.create_model(MODEL, depth=1, img_size=32).eval()
        made.append(model if mode is None else fastvit.accelerate(model, mode))
    width = made[0].embed_dim
    return Setting(*made, torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, width))


@contextmanager
def stubbed(parts: Setting) -> Iterator[None]:
    """Inside, nothing is computed: see this module's first lines."""
    import fastvit
    from fastvit.ops import native

    functional, library = stubs(parts.timm.blocks, parts.x)
    with ExitStack() as stack:
        stack.enter_context(no_gpu())
        for name, stub in functional.items():
            stack.enter_context(mock.patch.object(F, name, stub))
        stack.enter_context(mock.patch.object(native, "ops", SimpleNamespace(**library)))
        stack.enter_context(fastvit.use_backend(**BACKENDS))
        yield


def providers(parts: Setting) -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]:
    """By a part's name our call and timm's, for inside ``stubbed``."""
    from fastvit import backends, ops
    from fastvit.layers.block import attention_half, mlp_half

    x, block, theirs = parts.x, parts.default.blocks[0], parts.timm.blocks[0]
    frozen = parts.frozen.blocks[0]
    attn, mlp, embed = block.attn, block.mlp, parts.default.patch_embed
    qkv = x.new_zeros(*x.shape[:-1], 3 * x.shape[-1])
    norm = (block.norm1.weight, block.norm1.bias)
    qkv_weights, out_weights = (attn.qkv.weight, attn.qkv.bias), (attn.proj.weight, attn.proj.bias)
    mlp_weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    given = (parts.images, embed.proj.weight, embed.proj.bias, parts.default.pos_embed)
    prefix, weights = parts.default.cls_token, (x, *norm, *qkv_weights)
    how = {"eps": 1e-6, "norm": "layer_norm", "frozen": False}
    return {
        "block": (lambda: block(x), lambda: theirs(x)),
        "block, frozen weights": (lambda: frozen(x), lambda: theirs(x)),
        "block, gradients recorded": (recorded(block, x), None),
        "gathering of both halves": (lambda: (attention_half(block), mlp_half(block)), None),
        "op layer_norm_linear": (lambda: ops.layer_norm_linear(x, *norm, *qkv_weights, validate=False), None),
        "op attention, with its launch": (lambda: ops.attention(qkv, attn.num_heads, validate=False), None),
        "op linear_residual": (lambda: ops.linear_residual(x, *out_weights, x, validate=False), None),
        "op layer_norm_mlp": (lambda: ops.layer_norm_mlp(x, *norm, *mlp_weights, validate=False), None),
        "op patch_embed, with its launch": (lambda: ops.patch_embed(*given, prefix), None),
        "resolve of layer_norm_linear": (
            lambda: backends.resolve("layer_norm_linear", *weights, **how),
            None,
        ),
        **_launches(qkv, attn.num_heads),
        "torch.add, for comparison": (lambda: x + x, None),
    }


def recorded(block: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A training step's forward. timm's is not beside it: its stubs would record nothing."""
    leaf = x.detach().requires_grad_()

    def call() -> Tensor:
        with torch.enable_grad():
            return block(leaf)

    return call


def _launches(qkv: Tensor, heads: int) -> dict[str, tuple[Callable[[], Any], None]]:
    from fastvit_kernels import attention
    from fastvit_kernels.attention_options import Options

    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    out, scale = qkv.new_zeros(qkv.shape[0], qkv.shape[1], heads * q.shape[-1]), q.shape[-1] ** -0.5

    def plan():
        return attention.plan_fwd(q, k, v, out, None, Options(scale), "sm_90")

    return {
        "launcher attention_fwd": (lambda: attention.attention_fwd(q, k, v, scale=scale), None),
        "plan of attention_fwd": (plan, None),
        "Triton's own launch of it": (plan(), None),
    }


@contextmanager
def by_tables() -> Iterator[None]:
    """Inside ``stubbed`` no backend is named: what is, tables chose, as users have it."""
    from fastvit import backends, frames

    resolve, named = backends.resolve, frames.stack.copy()

    def chosen(op: str, *args: Any, **kwargs: Any) -> str:
        with backends.use_backend(**BACKENDS):
            return resolve(op, *args, **kwargs)

    frames.stack.clear()
    try:
        with mock.patch.object(backends, "resolve", chosen):
            yield
    finally:
        frames.stack[:] = named


def rows(rounds: int = ROUNDS) -> list[Row]:
    """The table: each part's microseconds."""
    parts = setting()

    def timed(name: str, ours: Callable[[], Any], timm: Callable[[], Any] | None) -> Row:
        return Row(name, least(ours, rounds), None if timm is None else least(timm, rounds))

    with torch.no_grad(), stubbed(parts):
        provided = providers(parts)
        with by_tables():
            found = [timed(f"{name}, by `auto`", *provided[name]) for name in BLOCKS]
        found += [timed(name, *calls) for name, calls in provided.items()]
    return found


def bench_host_command(console: Any, rounds: int) -> int:
    """Print the table; the exit status is 0."""
    from rich.table import Table

    table = Table(title="CPU time of this thread, us a call; nothing is computed")
    for name in ("part", "ours", "timm's", "ratio"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in rows(rounds):
        beside = ("", "") if row.timm is None else (f"{row.timm:.1f}", f"{row.ratio:.2f}")
        table.add_row(row.part, f"{row.ours:.1f}", *beside)
    console.print(table)
    return 0
