"""Images to tokens.

Every provider makes tokens [B, 1 + N, D] of images [B, 3, 224, 224], class token and positions included; of
uint8 images it normalises their colours as well. Images get no gradient, as in training.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops, use_backend

from .op_bench import DIRECTIONS, Case, Inputs, Provider, Results, compiled, differentiated

WIDTHS, PATCHES, BATCHES = (384, 768, 1024), (14, 16, 32), (1, 8, 64, 256)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS, SIDE = 3, 224


@dataclass(frozen=True)
class PatchEmbed(Case):
    """Patches of ``patch`` x ``patch`` pixels, of bytes or floats, to D = ``width`` channels."""

    patch: int
    width: int
    bytes: bool = False
    side: int = SIDE
    trained = ("weight", "bias", "pos_embed", "prefix")

    @property
    def op(self) -> str:
        return "patch_embed, uint8" if self.bytes else "patch_embed"

    @property
    def shape(self) -> tuple[int, ...]:
        return CHANNELS, self.side, self.patch, self.width

    @property
    def title(self) -> str:
        pixels = "uint8" if self.bytes else "float"
        return (
            f"patch_embed {self.direction} {self.dtype} {pixels} B={self.batch} p={self.patch} D={self.width}"
        )

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def pixels(self) -> int:
        return CHANNELS * self.patch**2

    @property
    def flops(self) -> float:
        product = 2 * self.batch * self.patches * self.pixels * self.width
        return product * (2 if self.direction == "step" else 1)

    @property
    def bytes_moved(self) -> float:
        size = self.torch_dtype.itemsize
        images = self.batch * self.patches * self.pixels * (1 if self.bytes else size)
        tokens = self.batch * (1 + self.patches) * self.width * size
        # weight and bias, positions of all tokens, one class token
        weights = self.width * (self.pixels + 1 + (1 + self.patches) + 1) * size
        one_way = images + tokens + weights
        return one_way + tokens + weights if self.direction == "step" else one_way

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        of = partial(torch.randn, generator=generator, device=device, dtype=self.torch_dtype)
        images = (self.batch, CHANNELS, self.side, self.side)
        given = {
            "images": torch.randint(0, 256, images, generator=generator, device=device, dtype=torch.uint8)
            if self.bytes
            else of(images),
            "weight": of(self.width, CHANNELS, self.patch, self.patch) / self.pixels**0.5,
            "bias": of(self.width) / 8,
            "pos_embed": of(1, 1 + self.patches, self.width) / 8,
            "prefix": of(1, 1, self.width),
            "grad": of(self.batch, 1 + self.patches, self.width),
        }
        if self.bytes:
            given |= {"mean": torch.tensor(MEAN, device=device), "std": torch.tensor(STD, device=device)}
        return given

    def reference(self, **inputs: Tensor) -> Tensor:
        return eager(**inputs)

    def uncancelled(self, images: Tensor, mean=None, std=None, **inputs: Tensor) -> Results:
        inputs["images"] = normalized(images, torch.float64, mean, std)
        return differentiated(eager)(self, {name: tensor.abs() for name, tensor in inputs.items()})()

    def parts(self, results: Results) -> dict[str, tuple[Tensor, str]]:
        named = {} if self.direction == "bwd" else {"out": (results[0], "op")}
        if self.direction != "fwd":
            gradients = zip(self.trained, results[-len(self.trained) :], strict=True)
            named |= {f"d{name}": (gradient, "param_grad") for name, gradient in gradients}
        return named


def eager(images, weight, bias, pos_embed, prefix, mean=None, std=None) -> Tensor:
    x = normalized(images, weight.dtype, mean, std)
    return embedded(
        F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2), pos_embed, prefix
    )


def linear(images, weight, bias, pos_embed, prefix, mean=None, std=None) -> Tensor:
    """The same with the patches gathered for a matrix product: often faster than torch's convolution."""
    x = normalized(images, weight.dtype, mean, std)
    (batch, channels, height, width), (ph, pw) = x.shape, weight.shape[2:]
    patches = x.reshape(batch, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
    return embedded(F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), bias), pos_embed, prefix)


def normalized(images: Tensor, dtype: torch.dtype, mean: Tensor | None, std: Tensor | None) -> Tensor:
    if mean is None:
        return images
    x = images.to(torch.promote_types(dtype, mean.dtype)) / 255
    return ((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(dtype)


def embedded(tokens: Tensor, pos_embed: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1) + pos_embed


def triton(**inputs: Tensor) -> Tensor:
    with use_backend(patch_embed="triton"):
        return ops.patch_embed(**inputs)


def launcher(case: PatchEmbed, inputs: Inputs) -> Callable[[], Results]:
    """The kernels without the op around them; what is derived from the weight, once, is made before."""
    from fastvit_kernels.patch_embed import patch_embed_bwd, patch_embed_fwd, project

    given = dict(inputs)
    grad = given.pop("grad")
    precision = "tf32" if case.dtype == "tf32" else "ieee"
    names = ("images", "weight", "bias", "mean", "std")
    kept = project(*[given.get(name) for name in names]) if case.direction == "fwd" else None

    def forward() -> Results:
        return (patch_embed_fwd(**given, precision=precision, projection=kept),)

    def backward() -> Results:
        colours = {name: given.get(name) for name in ("mean", "std")}
        sizes = {
            "num_prefix": 1,
            "pos_embed_rows": 1 + case.patches,
            "needs": (False, True, True, True, True),
        }
        return patch_embed_bwd(
            grad, given["images"], given["weight"], **sizes, **colours, precision=precision
        )[1:]

    return {"fwd": forward, "bwd": backward, "step": lambda: forward() + backward()}[case.direction]


def providers(case: PatchEmbed, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    given = {name: differentiated(forward) for name, forward in (("eager", eager), ("linear", linear))}
    given["compiled"] = compiled(eager)
    if device.type == "cuda":
        return given | {"fastvit triton": differentiated(triton), "fastvit kernel": launcher}, {}
    return given, {"fastvit triton": "Triton needs a CUDA GPU, and its interpreter's speed means nothing"}


def cases(device: torch.device, quick: bool, dtypes: tuple[str, ...]) -> Iterator[PatchEmbed]:
    """The widths and patches of ViT-S, B and L; bytes at the width of a ViT-B only."""
    if device.type != "cuda":
        sizes = (
            [(1, 16, 384)]
            if quick
            else [(batch, p, w) for batch in (1, 8) for p in (16, 32) for w in (384, 768)]
        )
    elif quick:
        sizes = [(1, 16, 768), (64, 16, 768), (64, 14, 1024)]
    else:
        sizes = [(batch, patch, width) for width, patch, batch in product(WIDTHS, PATCHES, BATCHES)]
    dtypes = dtypes[:1] if quick else dtypes
    for dtype, (batch, patch, width), of_bytes in product(dtypes, sizes, (False, True)):
        if of_bytes and not quick and width != 768:
            continue
        for direction in DIRECTIONS:
            yield PatchEmbed(direction, dtype, batch, patch, width, of_bytes)
