"""Every op on its kernels, forward and backward, on a few small tensors: what compute-sanitizer watches.

Run under it by `make gpu`; by hand: `compute-sanitizer python -m fastvit_benchmarks.gpu.sanitized`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from fastvit import ops, use_backend
from fastvit.ops import choices

BATCH, TOKENS, WIDTH, HEADS = 2, 50, 192, 3
HEAD = WIDTH // HEADS
FUSED = "fused"  # fc1 with its activation, where the library has that
Draw = Callable[..., Tensor]


def calls(draw: Draw) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """A title, the op, and a call of it: plain, and with what makes its kernels take other paths."""
    x, residual = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH)
    qkv = draw(BATCH, TOKENS, 3 * WIDTH)
    vector, square = partial(draw, WIDTH), draw(WIDTH, WIDTH)
    yield "plain", "attention", lambda: ops.attention(qkv, HEADS)
    rope = {"rope_cos": draw(TOKENS - 1, HEAD).detach(), "rope_sin": draw(TOKENS - 1, HEAD).detach()}
    rope |= {"num_prefix_tokens": 1, "qk_norm": "layer_norm", "key_mask": keys(qkv.device)}
    rope |= {f"{part}_norm_weight": draw(HEAD) for part in "qk"}
    yield "rotary, norms, mask", "attention", lambda: ops.attention(qkv, HEADS, **rope)
    weight = draw(WIDTH, 3, 16, 16)
    images = draw(BATCH, 3, 112, 112)
    bytes_ = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=images.device)
    for title, pixels in (("floats", images), ("bytes", bytes_)):
        embed = (pixels, weight, vector(), draw(1, 50, WIDTH), draw(1, 1, WIDTH))
        yield title, "patch_embed", lambda embed=embed: ops.patch_embed(*embed)
    norm, projection = (vector(), vector()), (draw(3 * WIDTH, WIDTH), draw(3 * WIDTH))
    yield "plain", "layer_norm_linear", lambda: ops.layer_norm_linear(x, *norm, *projection)
    scale = {"layer_scale": vector()}
    yield "scaled", "linear_residual", lambda: ops.linear_residual(x, square, vector(), residual, **scale)
    mlp = (*norm, draw(4 * WIDTH, WIDTH), draw(4 * WIDTH), draw(WIDTH, 4 * WIDTH), vector())
    for title in ("plain", FUSED):
        yield title, "layer_norm_mlp", lambda: ops.layer_norm_mlp(x, *mlp, **scale)


def keys(device: torch.device) -> Tensor:
    """A key mask that leaves out the last ten tokens of the second image."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=device)
    mask[1, -10:] = False
    return mask


def main(
    device: Annotated[str, typer.Option(help="Where.")] = "cuda",
    triton: Annotated[str, typer.Option(help="The backend of attention and patch_embed.")] = "triton",
    compiled: Annotated[str, typer.Option(help="The other ops'.")] = "cuda",
) -> None:
    """Run every call in inference and in training."""
    generator, count = torch.Generator(device).manual_seed(0), 0
    for dtype in (torch.bfloat16, torch.float32):

        def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.randn(size, generator=generator, device=device) / size[-1] ** 0.5
            return values.to(dtype).requires_grad_()

        for title, op, call in calls(draw):
            backend = triton if op in ("attention", "patch_embed") else compiled
            with use_backend(**{op: backend}), choices.fusing(title == FUSED):
                with torch.no_grad():
                    call()
                call().float().square().sum().backward()
            print(f"{op} {dtype}: {title}")
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls ran")


if __name__ == "__main__":
    typer.run(main)
