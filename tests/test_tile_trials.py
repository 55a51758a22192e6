"""Tiles near a tile, what a GPU is asked of them, and that a planned call is the op's."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import test_tiles
import torch

from fastvit_benchmarks import op_bench
from fastvit_benchmarks.tiles import calls as tile_calls
from fastvit_benchmarks.tiles import trials as tile_trials
from fastvit_benchmarks.tiles.neighbours import SEEDS, neighbours
from fastvit_benchmarks.tiles.trials import Trials
from fastvit_benchmarks.timing import Timing
from fastvit_kernels import tiles
from fastvit_kernels.launch import Launch

ARCH = "sm_90"
CALL = tile_calls.attention_call("attention_fwd", "bfloat16", 64, 197, 12, 64)


def entry():
    """Which serves the call."""
    return tiles.table(ARCH)["attention_fwd"][0]


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_every_neighbour_is_a_valid_entry(arch):
    for kernel, rows in tiles.table(arch).items():
        for index, row in enumerate(rows):
            near = neighbours(kernel, row, min(row.get("head_dim", 64), 128))
            assert near, row
            unlike = [{name for name in row if tile[name] != row[name]} for tile in near]
            seeds = len(SEEDS.get(kernel, ()))
            assert all(len(names) >= 1 for names in unlike)
            assert all(len(names) <= 2 for names in unlike[seeds:])
            assert not any(names & {"dtype", "tokens", "head_dim", "load", "status"} for names in unlike)
            for tile in near:
                with tiles.overriding(kernel, arch, index, tile):
                    test_tiles.test_names_and_values_are_known(arch)


def test_only_short_sequences_are_resident():
    long = next(row for row in tiles.table(ARCH)["attention_fwd"] if "tokens" not in row)
    assert not any(tile["RESIDENT"] for tile in neighbours("attention_fwd", long))


def test_overriding_is_seen_by_plans_and_ends():
    call, given = CALL, CALL.without_data()
    before = call.plan(given, ARCH)[0][0]
    with tiles.overriding("attention_fwd", ARCH, 0, entry() | {"num_warps": 16}):
        assert call.plan(given, ARCH)[0][0].num_warps == 16
    assert call.plan(given, ARCH)[0][0].num_warps == before.num_warps == 4


class Fake:
    """A launch, as far as it is compared."""

    def __init__(self, tile):
        self.constants, self.num_warps, self.num_stages = {}, tile.num_warps, tile.num_stages


def planned(arch, sizes):
    for tokens in sizes:
        yield (
            f"half N={tokens}",
            Fake(tiles.tile("attention_fwd", arch, "half", head_dim=64, tokens=tokens, load=0)),
        )


def test_only_launches_that_an_entry_changes_are_compiled(monkeypatch):
    examine = pytest.importorskip("fastvit_kernels.aot_compile")
    seen = []

    def examined(launch, label, arch):
        seen.append(label)
        return examine.Compiled("k", label, arch, faults=("spills: 8",) if launch.num_warps == 16 else ())

    monkeypatch.setattr(examine, "examine", examined)
    for warps, said in ((16, "half N=197: spills: 8"), (2, "")):
        tile = entry() | {"num_warps": warps}
        assert tile_trials.faults(planned, ARCH, "attention_fwd", 0, tile, (197, 577)) == said
    assert seen == ["half N=197"] * 2


def test_a_compiler_that_crashes_is_a_fault_of_its_tile_alone(monkeypatch):
    class Pool:
        """Dies of the tile of 16 warps, and with it all that was under way."""

        def __init__(self, workers, mp_context=None):
            self.workers = workers

        def submit(self, function, plan, arch, kernel, index, tile, given):
            crashes = self.workers > 1 or tile["num_warps"] == 16

            class Future:
                def result(self, timeout):
                    if crashes:
                        raise BrokenProcessPool
                    return ""

            return Future()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tile_trials, "ProcessPoolExecutor", Pool)
    entries = [entry() | {"num_warps": warps} for warps in (2, 16, 8)]
    trials = Trials(ARCH, torch.device("cpu"), workers=4)
    assert trials.compile("attention_fwd", 0, entries, [CALL]) == ["", tile_trials.CRASHED, ""]


def test_a_watchdog_is_told_of_every_answer(monkeypatch):
    told = []
    trials = Trials(ARCH, torch.device("cpu"), 1, lambda: told.append(0))
    done = Future()
    done.set_result("")
    trials.pool = SimpleNamespace(submit=lambda *job: done)
    assert trials.compile("attention_fwd", 0, [entry()] * 3, [CALL]) == [""] * 3
    assert len(told) == 3
    monkeypatch.setattr(tile_trials, "run_case", lambda *args, **how: SimpleNamespace(speedups={}))
    trials.speeds("attention_fwd", 0, [entry()], [CALL] * 2)
    assert len(told) == 5


def measured(monkeypatch, speeds, wrong=()):
    """Trials' speeds where op_bench finds these."""

    class Outcome:
        speedups = speeds

    monkeypatch.setattr(tile_trials, "run_case", lambda *args, **how: Outcome)
    trials = Trials(ARCH, torch.device("cpu"), workers=1)
    return trials.speeds("attention_fwd", 0, [entry()] * 4, [CALL])


def test_a_speed_is_of_right_tiles_that_are_slow_nowhere(monkeypatch):
    assert measured(monkeypatch, {"current": 1.0, "1": 1.1, "2": 0.9}) == [1.0, 1.1, None, None]
    assert measured(monkeypatch, {}) == [None] * 4  # the current one is wrong


SMALL = {
    "attention_fwd": tile_calls.attention_call("attention_fwd", "float32", 1, 5, 2, 16),
    "rotated": tile_calls.attention_call("attention_fwd", "float16", 1, 5, 1, 16, rotated=True),
    "attention_bwd": tile_calls.attention_call("attention_bwd_keys", "float16", 1, 5, 1, 16),
} | {
    kernel: tile_calls.patch_embed_call(kernel, "float32", 1, 24, side=32)
    for kernel in ("patch_embed_fwd", "patch_embed_dweight", "patch_embed_dimages")
}


@pytest.mark.parametrize("name", SMALL)
def test_planned_calls_are_what_is_judged(name, monkeypatch):
    """In the interpreter: the launches give the op's results, and a wrong one is seen."""
    pytest.importorskip("triton")
    monkeypatch.setattr(op_bench, "INPUT_SETS", 1)
    monkeypatch.setattr(op_bench, "measure", lambda calls, **how: dict.fromkeys(calls, Timing((1.0,))))
    for peak in ("peak_gbps", "peak_tflops"):
        monkeypatch.setattr(op_bench, peak, lambda *where: 1.0)
    call, device = SMALL[name], torch.device("cpu")
    kernel, index = call.kernel, call.place("cpu")
    trials = Trials("cpu", device, workers=1)
    right = trials._provider(kernel, index, tiles.table("cpu")[kernel][index])

    def wrong(case, inputs):
        (result,) = right(case, inputs)()
        return lambda: (1.01 * result,)

    outcome = op_bench.run_case(call, {"right": right, "wrong": wrong}, device, trials.here)
    assert outcome.absent == {}
    assert [row.ok for row in outcome.rows] == [True, False]


def test_launches_are_planned_without_data():
    for call in tile_calls.calls():
        launches, results = call.plan(call.without_data(), ARCH)
        assert all(isinstance(launch, Launch) for launch in launches)
        assert all(result.is_meta for result in results)


def test_tiles_known_to_be_good_come_first():
    """From the resident form at 257 tokens the online one of 128 queries is four numbers away."""
    row = tiles.table("sm_90")["attention_fwd"][1]
    assert row["RESIDENT"]
    first, *_ = neighbours("attention_fwd", row)
    assert first == row | {"RESIDENT": 0, "BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
    assert neighbours("attention_fwd", first)[0] != first
