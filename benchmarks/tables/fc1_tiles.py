"""Each tile of Hopper's fused products measured at a model's own shapes: the fastest right one is kept."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvit import fc1_tiles, gpus
from fastvit.fc1_tiles import Product

from ..bench_layer_norm_mlp import with_fc1
from ..gpu.facts import HOPPER
from ..harness import machine
from ..op_bench import Inputs, Outcome, Provider, Results, differentiated, run_case
from ..recorded import Recorded
from .tune import Candidate, notes

GAIN = 1.02  # two measurements of one tile differ by less
HALVES = ("bfloat16", "float16")


def products_of(case: Recorded) -> Iterator[Product]:
    """The products of a call for which the library may have a choice of tiles."""
    if case.dtype not in HALVES or case.op not in ("layer_norm_mlp", "layer_norm_linear"):
        return
    shapes = {name: kind.shape for name, kind in case.tensors}
    rows, width = shapes["x"][0] * shapes["x"][1], shapes["x"][2]
    if case.op == "layer_norm_linear":
        columns = sum(shape[0] for name, shape in shapes.items() if name.partition(".")[0] == "weight")
        if case.frozen:
            yield Product("folded_linear", rows, columns, width)
    elif "gate_weight" not in shapes and dict(case.options).get("activation") != "swiglu":
        hidden = shapes["fc1_weight"][0]
        if case.direction == "bwd":
            yield Product("backward", rows, hidden, shapes["fc2_weight"][0])
            return
        yield Product("forward", rows, hidden, width)
        if case.frozen:
            yield Product("folded", rows, hidden, width)


def asked(found: list[Candidate], device: torch.device) -> list[tuple[Candidate, Product]]:
    """What there is to measure on this device: nothing where the library has no such products."""
    if device.type != "cuda" or gpus.gpu_of(device).capability != HOPPER or not fc1_tiles.names():
        return []
    own = (candidate for candidate in found if candidate.backend == "cuda")
    return [(candidate, product) for candidate in own for product in products_of(candidate.case)]


def with_tile(provider: Provider, gpu: str, product: Product, tile: str) -> Provider:
    """The op with its product fused, and this tile for it."""

    def prepare(case: Recorded, inputs: Inputs) -> Callable[[], Results]:
        run = with_fc1(provider, True, folded=product.kind.startswith("folded"))(case, inputs)

        def forced() -> Results:
            if not fc1_tiles.force(gpu, product, tile):
                raise RuntimeError(f"there is no {product.kind} kernel with the tile {tile}")
            return run()

        return forced

    return prepare


def measure(
    calls: list[tuple[Candidate, Product]], device: torch.device, on_step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each product: the tile that is faster than the model's by more than noise, or the model's."""
    here, rows = machine(), []
    gpu, count = gpus.gpu_of(device).name, torch.cuda.get_device_properties(device).multi_processor_count
    try:
        for candidate, product in calls:
            on_step(f"tiles of {candidate.case.title} {product.kind}")
            fc1_tiles.library().fastvit_fc1_clear()
            own = fc1_tiles.chosen(gpu, count, product)
            tiles = [own, *(name for name in fc1_tiles.names() if name != own)]
            op = differentiated(candidate.case.on("cuda"))
            providers = {tile: with_tile(op, gpu, product, tile) for tile in tiles}
            outcome = run_case(candidate.case, providers, device, here, rounds=20, seconds=0.1)
            rows.append(_row(candidate, product, own, outcome) | notes(here))
    finally:
        fc1_tiles.load()
    return rows


def _row(candidate: Candidate, product: Product, own: str, outcome: Outcome) -> dict[str, Any]:
    right = {tile for tile, found in outcome.checks.items() if found and all(check.ok for check in found)}
    speeds = {tile: speed for tile, speed in outcome.speedups.items() if tile in right}
    best = max(speeds, key=speeds.__getitem__, default=own)
    if speeds.get(best, 0.0) < GAIN:
        best = own
    asked = candidate.question
    facts = {
        "op": fc1_tiles.OP,
        "gpu": asked.gpu,
        "dtype": asked.dtype,
        "direction": candidate.case.direction,
    }
    sizes = {name: [size, size] for name, size in product._asdict().items() if name != "kind"}
    verdict = {"tile": best, "ok": best in right, "ratio": round(speeds.get(best, 0.0), 3)}
    return facts | {"options": product.kind} | sizes | verdict
