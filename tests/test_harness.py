"""The benchmarks' harness, on clocks that the tests wind themselves."""

import json
from dataclasses import fields

import pytest
import torch

from fastvit_benchmarks import machine as machine_module
from fastvit_benchmarks.harness import Machine, Row, Timing, load, machine, measure, ratios, rotating, save

HERE = Machine("a CPU", 2, None, None, "2.14.1", "3.8.0", "abc1234", "2026-01-31")


class FakeClock:
    """Stands still, except while a provider of its own runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self) -> float:
        return self.now

    def provider(self, name, *seconds):
        turn = rotating(float, seconds)

        def call():
            self.calls.append(name)
            self.now += turn()

        return call


@pytest.fixture
def clock():
    return FakeClock()


def test_rounds_are_interleaved_and_warmup_is_not_kept(clock):
    providers = {"a": clock.provider("a", 0.5, 0.001), "b": clock.provider("b", 0.25, 0.002)}
    timings = measure(providers, rounds=3, warmup=1, clock=clock)
    assert clock.calls == ["a", "b"] * 4
    assert timings["a"].samples == pytest.approx((1, 500, 1))
    assert timings["b"].samples == pytest.approx((2, 250, 2))


def test_rounds_go_on_until_enough_time_was_spent(clock):
    providers = {"a": clock.provider("a", 0.25), "b": clock.provider("b", 0.75)}
    timings = measure(providers, rounds=2, warmup=5, min_seconds=4.0, clock=clock)
    assert len(timings["a"].samples) == len(timings["b"].samples) == 4


def test_sync_stands_on_both_sides_of_a_sample(clock):
    def sync():
        clock.calls.append("sync")
        clock.now += 1.0

    timings = measure({"a": clock.provider("a", 0.5)}, rounds=1, warmup=0, sync=sync, clock=clock)
    assert clock.calls == ["sync", "a", "sync"]
    assert timings["a"].samples == (1500.0,)


def test_every_round_ticks(clock):
    ticks = []
    measure({"a": clock.provider("a", 1)}, rounds=4, warmup=3, clock=clock, on_round=lambda: ticks.append(0))
    assert len(ticks) == 7


@pytest.mark.parametrize("wrong", [{"providers": {}}, {"rounds": 0}, {"warmup": -1}])
def test_nothing_to_measure_is_an_error(wrong):
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(**{"providers": {"a": int}} | wrong)


def test_quantiles():
    timing = Timing(tuple(range(11)))
    assert (timing.p20, timing.p50, timing.p80) == (2, 5, 8)


def test_ratios_are_taken_round_by_round():
    drifting = {"base": Timing((10, 20, 90)), "twice": Timing((5, 10, 45)), "half": Timing((20, 40, 180))}
    assert ratios(drifting, "base") == {"base": 1, "twice": 2, "half": 0.5}
    with pytest.raises(ValueError, match="no baseline 'x'; measured were base, twice, half"):
        ratios(drifting, "x")


def test_rotating_feeds_the_inputs_in_turn():
    seen = []
    call = rotating(seen.append, "abc")
    for _ in range(5):
        call()
    assert seen == list("abcab")


def test_machine_tells_what_is_here():
    facts = machine()
    assert facts.torch == torch.__version__
    assert facts.threads == torch.get_num_threads()
    assert facts.cpu
    assert (facts.gpu is None) == (not torch.cuda.is_available())
    assert facts.name.startswith(facts.gpu or facts.cpu)


def test_a_checkout_that_is_not_ours_is_not_reported(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTVIT_COMMIT", raising=False)
    monkeypatch.setattr(machine_module, "_ROOT", tmp_path)
    assert machine_module.commit.__wrapped__() is None


def test_sources_without_a_history_are_told_their_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_module, "_ROOT", tmp_path)
    monkeypatch.setenv("FASTVIT_COMMIT", "abc1234")
    assert machine_module.commit.__wrapped__() == "abc1234"


def test_sources_are_what_is_run_and_not_the_tables(tmp_path):
    for folder in ("fastvit", "kernels", "benchmarks", "csrc"):
        (tmp_path / folder).mkdir()
    first = machine_module.sources(tmp_path)
    (tmp_path / "kernels" / "tiles.json").write_text("{}")
    assert machine_module.sources(tmp_path) == first
    found = {first}
    for name in ("kernels/a.py", "csrc/a.cu", "csrc/b.cu"):
        (tmp_path / name).write_text("x")
        found.add(machine_module.sources(tmp_path))
    assert len(found) == 4
    assert len(machine_module.sources()) == 16


def test_a_command_that_is_absent_or_fails_says_nothing():
    assert machine_module._output("fastvit-no-such-command") is None
    assert machine_module._output("false") is None


def row(**more) -> Row:
    known = {"op": "attention", "provider": "triton", "dtype": "float16", "shape": (8, 197, 2304), "batch": 8}
    return Row.of(Timing((2.0, 2.0, 2.0)), HERE, **known | {"ok": True} | more)


def test_row_derives_rates_from_the_median():
    made = row(flops=4e12, bytes_moved=1e9, peak_tflops=4000.0, peak_gbps=2000.0)
    assert (made.tflops, made.gbps, made.roofline_pct) == (2000.0, 500.0, 50.0)
    assert (row().tflops, row().gbps, row().roofline_pct) == (None, None, None)


def test_rows_survive_a_file(tmp_path):
    path = tmp_path / "cpu" / "attention.json"
    rows = [row(), row(provider="reference", error_ratio=1.0)]
    save(rows, path)
    assert load(path) == rows
    assert list(json.loads(path.read_text())[0]) == [field.name for field in fields(Row)]


def test_rows_of_before_there_were_reasons_are_read(tmp_path):
    path = tmp_path / "old.json"
    save([row(ok=False), row(ok=False, reason="its process died"), row(reason="")], path)
    old = [
        {name: value for name, value in kept.items() if name != "reason"}
        for kept in json.loads(path.read_text())
    ]
    assert [kept.verdict for kept in load(path)] == ["wrong", "not run", "ok"]
    path.write_text(json.dumps(old))
    assert [(kept.reason, kept.verdict) for kept in load(path)] == [
        (None, "wrong"),
        (None, "wrong"),
        (None, "ok"),
    ]


def test_a_file_of_other_fields_is_an_error(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('[{"op": "attention", "pace": 1}]')
    with pytest.raises(ValueError, match="fields that rows do not: pace"):
        load(path)
