"""What `auto` asks a table about models on a GPU, and how each answer is measured."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from fastvit.accelerate import accelerate

from .. import bench_layer_norm_linear, bench_layer_norm_mlp
from ..halves import on_backend
from ..handed_on import HandedOn, handing_on
from ..op_bench import Case, Provider, differentiated
from ..recorded import Recorded
from ..roofline import DTYPES, products_in
from ..tiles.calls import TileCall
from .measured_table import Point
from .tune import candidates

# Of timm, most used first, each with one block: all of a model's blocks ask the same.
MODELS = (
    ("vit_base_patch16_224", {}),
    ("vit_small_patch16_224", {}),
    ("vit_large_patch16_224", {}),
    ("vit_base_patch14_dinov2", {"img_size": 224}),  # LayerScale, 257 tokens
    ("vit_large_patch14_dinov2", {"img_size": 224}),
    ("eva02_base_patch14_224", {}),  # rotary positions, SwiGLU with a norm inside
    ("vit_so400m_patch14_siglip_224", {}),  # heads of 72 channels
    ("vit_small_patch14_dinov2", {"img_size": 224}),
    ("eva02_small_patch14_224", {}),
    ("vit_tiny_patch16_224", {}),
)
BATCHES = (1, 256, 64, 8)
MODES = ("bfloat16", "float16", "tf32", "float32")
FUSED_WIDTHS = (768, 384, 1024)


@dataclass(frozen=True)
class Asked:
    """A call that a table is asked of, and how to measure it: torch's way, and ours."""

    point: Point
    case: Case
    torchs: Provider
    ours: Provider


def of_models(device: torch.device, models: Iterable = MODELS, modes: Iterable = MODES) -> Iterator[Asked]:
    """Each question once, of the most important mode, direction, model and batch first."""
    import timm

    seen, made = set(), {}
    for mode, training, (name, options), batch in product(modes, (False, True), models, BATCHES):
        if name not in made:
            made[name] = accelerate(timm.create_model(name, depth=1, **options)).to(device)
        model = made[name].to(DTYPES[mode]).train(training)
        size = timm.data.resolve_model_data_config(model)["input_size"]
        side = options.get("img_size", size[-1])
        x = torch.empty(batch, size[0], side, side, dtype=DTYPES[mode], device=device)
        with products_in(mode):
            found = candidates(model, (x,), {}, training)
        for candidate in found:
            case, asked = candidate.case, candidate.question
            key = (asked.op, asked.dtype, case.direction, asked.options, tuple(asked.sizes.items()))
            if case.direction == ("bwd" if training else "fwd") and key not in seen:
                seen.add(key)
                point = Point(*key[:4], dict(asked.sizes), False, 0.0)
                ours = differentiated(case.on(candidate.backend))
                yield Asked(point, _judged(case), differentiated(case.reference), ours)


def _judged(case: Recorded) -> Recorded:
    """The case with torch's exact attention as the yardstick in tf32, which its fused one does not use."""
    return TileCall(**vars(case)) if case.op == "attention" else case


def fused() -> Iterator[Asked]:
    """fc1 with its activation beside the product and a pass for it, where the library has both."""
    sizes = product(("bfloat16", "float16"), ("fwd", "bwd"), FUSED_WIDTHS, BATCHES)
    for dtype, direction, width, batch in sizes:
        case = bench_layer_norm_mlp.LayerNormMlp(direction, dtype, batch, 197, width)
        bounds = {"width": width, "hidden": 4 * width, "rows": batch * 197}
        library = differentiated(on_backend(case, "cuda"))
        both = (bench_layer_norm_mlp.with_fc1(library, on) for on in (False, True))
        yield Asked(Point(case.op, dtype, direction, "fused", bounds, False, 0.0), case, *both)


def folded() -> Iterator[Asked]:
    """fc1 and QKV with the norm folded into them beside the norm in a pass of its own."""
    for dtype, width, batch in product(("bfloat16", "float16"), FUSED_WIDTHS, BATCHES):
        bounds = {"width": width, "rows": batch * 197}
        mlp = bench_layer_norm_mlp.LayerNormMlp("fwd", dtype, batch, 197, width)
        qkv = bench_layer_norm_linear.LayerNormLinear("fwd", dtype, batch, 197, width)
        for case, inner in (
            (mlp, {"hidden": 4 * width}),
            (qkv, {"out": 3 * width}),
        ):
            library = differentiated(partial(on_backend(case, "cuda"), frozen=True))
            both = (bench_layer_norm_mlp.with_fc1(library, True, folded=on) for on in (False, True))
            yield Asked(Point(case.op, dtype, "fwd", "folded", bounds | inner, False, 0.0), case, *both)


def moments() -> Iterator[Asked]:
    """The projection that leaves moments for the MLP's norm beside one after which they take a pass."""
    for dtype, width, batch in product(("bfloat16", "float16"), FUSED_WIDTHS, BATCHES):
        case = HandedOn("fwd", dtype, batch, 197, width)
        bounds = {"width": width, "in": width, "rows": batch * 197}
        point = Point(case.op, dtype, "fwd", "moments", bounds, False, 0.0)
        yield Asked(point, case, *(handing_on(on) for on in (False, True)))
