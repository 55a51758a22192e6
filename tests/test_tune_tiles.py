"""The tuner of tiles, on GPUs whose times are formulas: what it takes, what it leaves, what it writes."""

import itertools
import json
import random

import pytest
import test_tiles
import torch
import typer
from typer.testing import CliRunner

from fastvit_benchmarks import files
from fastvit_benchmarks.attempts import Attempts
from fastvit_benchmarks.tiles import calls as tile_calls
from fastvit_benchmarks.tiles import file as tile_file
from fastvit_benchmarks.tiles import tune_tiles
from fastvit_kernels import tiles

ARCH = "sm_90"
NOTES = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-25", "commit": "abc1234"}
CALLS = [
    tile_calls.attention_call("attention_fwd", "bfloat16", 64, 197, 12, 64),
    tile_calls.attention_call("attention_bwd_keys", "bfloat16", 64, 197, 12, 64),
    tile_calls.patch_embed_call("patch_embed_fwd", "bfloat16", 64, 768),
]


@pytest.fixture(autouse=True)
def _own_tables(tmp_path, monkeypatch):
    """A copy of the shipped files."""
    for path in tiles.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.table.cache_clear()
    tiles.tile.cache_clear()
    yield
    monkeypatch.undo()
    tiles.table.cache_clear()
    tiles.tile.cache_clear()


def among(tile, numbers):
    """Whether the tile has one of these sets of numbers."""
    return any(tile.items() >= given.items() for given in numbers)


class FakeGpu:
    """Times are ``cost(kernel, tile)``, with noise; ``wrong``, ``broken`` and ``unfit`` are of tiles."""

    def __init__(self, cost, noise=0.005, wrong=(), broken=(), unfit=()):
        self.cost, self.noise, self.random = cost, noise, random.Random(0)
        self.wrong, self.broken, self.unfit = wrong, broken, unfit
        self.measured = []

    def compile(self, kernel, index, entries, calls):
        return ["spills: 8 bytes a thread" if among(entry, self.broken) else "" for entry in entries]

    def ships(self, kernel, index, entry):
        return "spills beside a mask" if among(entry, self.unfit) else ""

    def speeds(self, kernel, index, entries, calls, rounds=15):
        self.measured.append((kernel, index, list(entries)))
        times = [self.cost(kernel, e) * (1 + self.random.uniform(-1, 1) * self.noise) for e in entries]
        wrong = [among(entry, self.wrong) for entry in entries]
        if wrong[0]:
            return [None] * len(entries)
        return [None if bad else times[0] / time for time, bad in zip(times, wrong, strict=True)]


def faster(**planted):
    """A cost of 1 for every tile, but for the one that differs from the shipped one in these numbers."""
    best = entry() | planted if planted else None
    return lambda kernel, tile: 0.8 if tile == best else 1.0


def entry(kernel="attention_fwd", index=0):
    return tiles.table(ARCH)[kernel][index]


def tune(gpu, calls=CALLS[:1], tried=None, **how):
    said = []
    times = {"deadline": 1.0, "clock": lambda: 0.0} | how
    counts = tune_tiles.tune(ARCH, calls, gpu, NOTES, Attempts(tried), say=said.append, **times)
    return counts, "\n".join(said)


def valid():
    """Every rule for the shipped tables, of the files that are there now."""
    for arch in test_tiles.FILES:
        test_tiles.test_names_and_values_are_known(arch)
        test_tiles.test_measurements_say_of_what(arch)
        test_tiles.test_a_kernel_has_the_same_constants_everywhere(arch)
        test_tiles.test_every_entry_is_reached(arch)
        for dtype in test_tiles.CLASSES:
            test_tiles.test_every_size_finds_an_entry(arch, dtype)
    test_tiles.test_a_file_for_each_architecture_and_one_for_the_rest()
    test_tiles.test_all_files_know_the_same_kernels()


@pytest.mark.parametrize(
    "planted", [{"num_stages": 2}, {"BLOCK_M": 128, "num_warps": 8}, {"RESIDENT": 0}], ids=str
)
def test_a_better_tile_is_found_and_written(planted):
    before = dict(entry())
    (measured, changed), said = tune(FakeGpu(faster(**planted)))
    assert (measured, changed) == (1, 1)
    written = json.loads((tiles.FOLDER / f"{ARCH}.json").read_text())["attention_fwd"][0]
    assert written == entry() == before | planted | {"status": "measured"} | NOTES
    assert f"{next(iter(planted))} {before[next(iter(planted))]} -> " in said
    valid()


def test_a_faster_tile_that_is_wrong_is_not_taken():
    gpu = FakeGpu(faster(num_stages=2), wrong=[{"num_stages": 2}])
    (measured, changed), _ = tune(gpu)
    assert (measured, changed) == (1, 0)
    assert entry()["num_stages"] == 1
    assert entry()["status"] == "measured"  # nothing right near it is faster


def test_a_tile_that_does_not_compile_is_passed_over():
    gpu = FakeGpu(faster(num_stages=2), broken=[{"num_stages": 2}])
    assert tune(gpu)[0] == (1, 0)
    assert all(tile["num_stages"] != 2 for _, _, tried in gpu.measured for tile in tried)
    broken = FakeGpu(faster(), broken=[{"RESIDENT": programs} for programs in (0, 2, 3)])
    assert "no tile near it compiles" in tune(broken)[1]


def test_a_tile_that_another_option_does_not_fit_is_passed_over_for_the_next():
    def cost(kernel, tile):
        return 0.7 if tile["num_stages"] == 2 else 0.8 if tile["num_warps"] == 8 else 1.0

    tune(FakeGpu(cost, unfit=[{"num_stages": 2}]))
    assert (entry()["num_stages"], entry()["num_warps"]) == (1, 8)


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_that_is_noise_is_not_taken(seed):
    """Of two dozen equal tiles the luckiest looks faster, once."""
    gpu = FakeGpu(faster(), noise=0.015)
    gpu.random.seed(seed)
    before = dict(entry())
    assert tune(gpu)[0] == (1, 0)
    assert entry() == before | {"status": "measured"} | NOTES


def test_a_gain_that_the_second_measurement_does_not_show_is_not_taken():
    times = iter([lambda k, t: 0.8 if t["num_stages"] == 2 else 1.0, lambda k, t: 1.0])

    class Lucky(FakeGpu):
        def speeds(self, *args, **how):
            self.cost = next(times)
            return super().speeds(*args, **how)

    assert tune(Lucky(None))[0] == (1, 0)
    assert entry()["num_stages"] == 1


def test_a_current_tile_that_is_wrong_is_said_and_left_as_it_is():
    before = (tiles.FOLDER / f"{ARCH}.json").read_text()
    counts, said = tune(FakeGpu(faster(), wrong=[{"RESIDENT": 3}]))
    assert counts == (0, 0)
    assert "WRONG" in said
    assert (tiles.FOLDER / f"{ARCH}.json").read_text() == before


def test_when_the_time_is_over_what_is_done_is_kept():
    clock = itertools.count().__next__
    assert tune(FakeGpu(faster()), CALLS, deadline=2, clock=clock)[0] == (2, 0)
    status = [row["status"] for rows in tiles.table(ARCH).values() for row in rows]
    assert status.count("measured") == 2
    valid()


def test_a_run_that_is_ended_leaves_a_whole_table(monkeypatch):
    write = files.write

    def killed(path, text):
        write(path, text)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(FakeGpu(faster()), CALLS)
    tiles.table.cache_clear()
    assert sum(row["status"] == "measured" for rows in tiles.table(ARCH).values() for row in rows) == 1
    valid()


def test_an_entry_that_a_run_died_of_is_passed_over_at_its_commit(tmp_path, monkeypatch):
    tried = tmp_path / "tiles.tried"
    tried.write_text(
        '{"begun": "attention_fwd 0 at abc1234"}\n{"begun": "attention_bwd_keys 0 at def5678"}\n'
    )
    before = dict(entry())
    counts, said = tune(FakeGpu(faster()), CALLS, tried)
    assert counts == (2, 0)
    assert "attention_fwd 0: its process died" in said
    assert entry() == before
    assert entry("attention_bwd_keys")["status"] == "measured"
    assert Attempts(tried).ended(f"attention_bwd_keys {CALLS[1].place(ARCH)} at abc1234")


def test_the_next_run_begins_with_what_is_not_measured():
    first, *_ = served = tune_tiles.served(ARCH, CALLS, "abc1234")
    assert (first.kernel, first.index) == ("attention_fwd", 0)
    tune(FakeGpu(faster()), CALLS[:1])
    again = tune_tiles.served(ARCH, CALLS, "abc1234")
    assert again == [*served[1:], first]
    assert tune_tiles.served(ARCH, CALLS, "def5678") == served  # at another commit all are to be measured


def test_every_calls_entry_is_written_and_the_rest_stays():
    calls = list(tile_calls.calls())
    tune(FakeGpu(faster()), calls)
    chosen = {(call.kernel, call.place(ARCH)) for call in calls}
    for kernel, rows in tiles.table(ARCH).items():
        for index, row in enumerate(rows):
            assert (row["status"] == "measured") == ((kernel, index) in chosen)
    assert len(chosen) >= 20
    valid()


def test_architectures_that_go_by_a_measured_one_keep_the_modelled_table():
    before = {arch: json.dumps(tiles.table(arch)) for arch in tiles.ARCHITECTURES}
    tile_file.write("sm_89", "attention_fwd", 0, tiles.table("sm_89")["attention_fwd"][0] | {"num_warps": 8})
    assert tiles.table("sm_89")["attention_fwd"][0]["num_warps"] == 8
    for arch in ("sm_120", "safe"):
        assert json.dumps(tiles.table(arch)) == before["sm_89"]


def test_the_most_important_come_first():
    order = [(call.kernel, call.dtype, call.sizes) for call in tile_calls.calls()]
    first = [kernel for kernel, dtype, _ in order[:20] if dtype == "bfloat16"]
    assert first[0] == "attention_fwd"
    assert set(first) >= {*tile_calls.ATTENTION, "patch_embed_fwd", "patch_embed_dweight"}
    assert all(dtype == "bfloat16" for _, dtype, _ in order[:20])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    app = typer.Typer()
    app.command()(tune_tiles.main)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "no CUDA GPU" in str(result.exception)
