"""Tiles of fc1's products that were measured: kept in a table, and taken by the library in its model's place.

The library is the real one's table of tiles, compiled for the CPU; times are made up.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from fc1_library import H100, compiled, needs_compiler

from fastvit import extension, fc1_tiles, gpus, measurements, native_backend, tuning
from fastvit.fc1_tiles import Product
from fastvit.measurements import Question
from fastvit_benchmarks.recorded import Recorded
from fastvit_benchmarks.tables import fc1_tiles as measuring
from fastvit_benchmarks.tables.tune import Candidate

pytestmark = needs_compiler
GPU = "NVIDIA H100 80GB HBM3"
LARGE = Product("forward", 50_432, 3072, 768)
ROW = {
    "op": "fc1_tile",
    "gpu": GPU,
    "dtype": "bfloat16",
    "direction": "fwd",
    "options": "forward",
    "columns": [3072, 3072],
    "depth": [768, 768],
    "rows": [50_432, 50_432],
    "tile": "128x128 stream-k",
    "ok": True,
    "ratio": 1.1,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fc1_tiles.with_types(compiled(tmp_path_factory.mktemp("fc1_tiles")))


@pytest.fixture(autouse=True)
def _own_table(library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fc1_tiles, "library", lambda: library)
    library.fastvit_fc1_clear()
    measurements.clear()
    yield
    library.fastvit_fc1_clear()
    measurements.clear()


def chosen(product=LARGE, gpu=GPU):
    return fc1_tiles.chosen(gpu, H100, product)


def test_a_row_of_the_table_is_taken_on_its_gpu():
    assert chosen() == "128x192 pingpong"
    measurements.keep([ROW])
    fc1_tiles.load()
    assert chosen() == ROW["tile"]
    assert chosen(gpu="NVIDIA H200") == chosen(LARGE._replace(rows=25_216)) == "128x192 pingpong"
    # Measured again, another tile has its place.
    measurements.keep([ROW | {"tile": "128x128 pingpong"}])
    fc1_tiles.load()
    assert chosen() == "128x128 pingpong"


def test_a_row_may_hold_for_a_range_of_rows():
    measurements.keep([ROW | {"rows": [1000, None]}])
    fc1_tiles.load()
    assert chosen() == chosen(LARGE._replace(rows=1000)) == ROW["tile"]
    assert chosen(LARGE._replace(rows=999)) != ROW["tile"]


@pytest.mark.parametrize(
    "row",
    [{"ok": False}, {"tile": "512x512 pingpong"}, {"options": "sideways"}, {"gpu": "NVIDIA H200"}],
    ids=str,
)
def test_a_row_of_no_use_is_left_out(row):
    measurements.keep([ROW | row])
    fc1_tiles.load()
    assert chosen() == "128x192 pingpong"


def test_the_table_is_read_when_the_library_is_first_there(monkeypatch):
    measurements.keep([ROW])
    monkeypatch.setattr(extension, "why_no_ops", lambda device: None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    fc1_tiles.load_once.cache_clear()
    assert native_backend._loads("cuda") is None
    assert chosen() == ROW["tile"]
    fc1_tiles.load_once.cache_clear()


def test_a_library_without_such_products(monkeypatch):
    assert fc1_tiles.with_types(SimpleNamespace()) is None
    monkeypatch.setattr(fc1_tiles, "library", lambda: None)
    assert fc1_tiles.names() == []
    fc1_tiles.load()


def mlp(direction="fwd", dtype=torch.bfloat16, frozen=True):
    given = [(2, 8, 64), (64,), (64,), (256, 64), (256,), (64, 256), (64,)]
    trained = direction == "bwd"
    tensors = [torch.zeros(size, dtype=dtype, requires_grad=trained) for size in given]
    named = str(dtype).removeprefix("torch.")
    return Recorded.of("layer_norm_mlp", tuple(tensors), {"frozen": frozen}, direction, named)


def qkv():
    given = [(2, 8, 64), (64,), (64,), (192, 64), (192,)]
    tensors = tuple(torch.zeros(size, dtype=torch.float16) for size in given)
    return Recorded.of("layer_norm_linear", tensors, {"frozen": True}, "fwd", "float16")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (mlp(), [Product("forward", 16, 256, 64), Product("folded", 16, 256, 64)]),
        (mlp(frozen=False), [Product("forward", 16, 256, 64)]),
        (mlp("bwd"), [Product("backward", 16, 256, 64)]),
        (mlp(dtype=torch.float32), []),
        (qkv(), [Product("folded_linear", 16, 192, 64)]),
    ],
    ids=["fwd", "weights that change", "bwd", "float32", "qkv"],
)
def test_the_products_of_a_call(case, expected):
    assert list(measuring.products_of(case)) == expected


def candidate(case):
    question = Question(case.op, GPU, case.dtype, (case.direction,), "", {"width": 64, "rows": 16})
    return Candidate(case, "cuda", question)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which each tile has the speed that is set, if its kernel ran with it."""
    speeds, wrong, ran = {}, set(), []
    monkeypatch.setattr(gpus, "gpu_of", lambda device=None: gpus.Gpu(GPU, (9, 0)))
    properties = SimpleNamespace(multi_processor_count=H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def run_case(case, providers, device, here, **how):
        found, checks = {}, {}
        for tile, provider in providers.items():
            try:
                provider(case, {})()
            except RuntimeError:
                continue
            checks[tile] = [SimpleNamespace(ok=tile not in wrong)]
            if tile not in wrong:
                found[tile] = speeds.get(tile, 1.0)
        return SimpleNamespace(checks=checks, speedups=found)

    def on(self, backend):
        product = next(measuring.products_of(self))
        return lambda **given: ran.append(chosen(product)) or torch.zeros(())

    monkeypatch.setattr(measuring, "run_case", run_case)
    monkeypatch.setattr(Recorded, "on", on)
    return SimpleNamespace(speeds=speeds, wrong=wrong, ran=ran, device=torch.device("cuda"))


def measured(hopper, case):
    asked = measuring.asked([candidate(case)], hopper.device)
    return measuring.measure(asked[:1], hopper.device, lambda name: None)[0]


SMALL, SECOND = Product("forward", 16, 256, 64), "128x128 stream-k"


def test_the_fastest_right_tile_is_kept(hopper):
    hopper.speeds |= {"128x192 pingpong": 1.3, SECOND: 1.2}
    hopper.wrong.add("128x192 pingpong")
    row = measured(hopper, mlp(frozen=False))
    assert set(hopper.ran) == set(fc1_tiles.names())
    assert (row["tile"], row["ok"]) == (SECOND, True)
    assert [row[name] for name in ("rows", "columns", "depth")] == [[16, 16], [256, 256], [64, 64]]
    measurements.keep([row])
    fc1_tiles.load()
    assert chosen(SMALL) == SECOND


def test_within_noise_the_models_own_tile_stays(hopper):
    own = chosen(SMALL)
    hopper.speeds |= {name: 1.01 for name in fc1_tiles.names() if name != own}
    assert measured(hopper, mlp(frozen=False))["tile"] == own
    hopper.wrong |= set(fc1_tiles.names())
    assert not measured(hopper, mlp(frozen=False))["ok"]


def test_a_kernel_that_is_not_there_is_not_measured(hopper, monkeypatch):
    monkeypatch.setattr(Recorded, "trained", ("x",))

    def differentiated(forward):
        return lambda case, inputs: lambda: (forward(),)

    monkeypatch.setattr(measuring, "differentiated", differentiated)
    measured(hopper, mlp("bwd"))
    assert 0 < len(set(hopper.ran)) < len(fc1_tiles.names())


def test_other_gpus_are_not_asked(hopper, monkeypatch):
    found = [candidate(mlp())]
    assert measuring.asked(found, torch.device("cpu")) == []
    monkeypatch.setattr(gpus, "gpu_of", lambda device=None: gpus.Gpu("NVIDIA A100", (8, 0)))
    assert measuring.asked(found, hopper.device) == []


def test_tune_says_which_tile_is_taken():
    row = tuning._tuned(ROW, "the model's tile")
    assert (row.now, row.before) == ("128x128 stream-k", "the model's tile")
    assert {"rows 50432", "columns 3072"} <= set(row.sizes.split(", "))
    assert json.loads(tuning.Tuning((row,)).to_json())["rows"][0]["now"] == "128x128 stream-k"
