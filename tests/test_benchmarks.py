"""The benchmarks of single ops: what they count, what they refuse to time, and what they keep."""

import io
import json
from dataclasses import fields

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastvit.cli import app
from fastvit_benchmarks import bench_attention, bench_patch_embed, op_bench, op_screen, roofline
from fastvit_benchmarks.bench_attention import Attention
from fastvit_benchmarks.bench_patch_embed import PatchEmbed
from fastvit_benchmarks.harness import Row, load, measure, ratios
from fastvit_benchmarks.op_bench import DIRECTIONS, differentiated
from fastvit_benchmarks.outputs import INTERRUPTED, Outputs

CPU = torch.device("cpu")
PROVIDERS = {Attention: bench_attention.providers, PatchEmbed: bench_patch_embed.providers}
TINY = {
    "attention": lambda direction="fwd": Attention(direction, "float32", 3, 5, 2, 4),
    "patch_embed": lambda direction="fwd": PatchEmbed(direction, "float32", 2, 4, 8, side=8),
    "bytes": lambda direction="fwd": PatchEmbed(direction, "float32", 2, 4, 8, bytes=True, side=8),
}


@pytest.fixture(autouse=True)
def _small_roofline(monkeypatch):
    monkeypatch.setitem(roofline.COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(roofline.PRODUCT, "cpu", (64, 64, 64))
    for kept in (roofline._copy, roofline._product):
        kept.cache_clear()
    yield
    for kept in (roofline._copy, roofline._product):
        kept.cache_clear()


def eager(case, device):
    """The benchmarks' own providers but the compiled ones."""
    given, absent = PROVIDERS[type(case)](case, device)
    return {name: provider for name, provider in given.items() if name != "compiled"}, absent


def off_by(factor):
    """Like ``eager``, with a provider of torch's whose output is wrong, and one of ours."""

    def providers(case, device):
        given, absent = eager(case, device)
        wrong = differentiated(lambda **inputs: factor * case.reference(**inputs))
        return given | {"wrong": wrong, "fastvit wrong": wrong}, absent

    return providers


def run(cases, providers=eager, path=None):
    """The status, what was shown, and the rows of what was measured."""
    console, outputs = Console(file=io.StringIO(), width=200), Outputs(json=path)
    pairs = [(case, providers) for case in cases]
    status = op_screen.run(pairs, CPU, console, outputs, rounds=2, seconds=0.0)
    return status, console.file.getvalue(), [row for row in outputs.rows if row.op not in ("copy", "matmul")]


@pytest.mark.parametrize("kind", TINY)
def test_every_row_says_all_that_it_must(kind, tmp_path):
    path = tmp_path / "rows.json"
    cases = [TINY[kind](direction) for direction in DIRECTIONS]
    status, shown, rows = run(cases, path=path)
    roofs = load(path)[: -len(rows)]
    assert load(path)[len(roofs) :] == rows
    assert [(row.op, row.dtype) for row in roofs] == [("copy", "uint8"), ("matmul", "float32")]
    offered = {(case.direction, name) for case in cases for name in eager(case, CPU)[0]}
    assert status == 0
    assert "0 wrong" in shown
    assert {(row.direction, row.provider) for row in rows} == offered
    for row in rows:
        assert row.ok
        assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert min(row.tflops, row.gbps, row.roofline_pct, row.error_ratio) > 0
        assert row.peak_mb is None
        assert (row.op, row.dtype, row.shape, row.batch) == (
            cases[0].op,
            "float32",
            cases[0].shape,
            cases[0].batch,
        )
        assert row.torch == torch.__version__
        assert row.threads == torch.get_num_threads()
    assert list(json.loads(path.read_text())[0]) == [field.name for field in fields(Row)]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_provider_of_ours_has_no_time_and_others_no_speed(kind, direction):
    status, shown, rows = run([TINY[kind](direction)], off_by(1.001))
    torchs, ours = [row for row in rows if row.provider in ("wrong", "fastvit wrong")]
    assert status == 0
    assert shown.count("WRONG") == 2
    assert "2 wrong" in shown
    for wrong in (torchs, ours):
        assert not wrong.ok
        assert wrong.reason.startswith("wrong: ")
        assert wrong.error_ratio > 10
    numbers = {ours.ms_p20, ours.ms_p50, ours.ms_p80, ours.tflops, ours.gbps, ours.roofline_pct}
    assert numbers == {None}
    assert torchs.ms_p50 > 0
    (line,) = [line for line in shown.splitlines() if line.startswith("wrong ")]
    assert line.split()[4] == "-"


def refuse(case, inputs):
    raise RuntimeError("no kernel\nfor this")


def exhaust(case, inputs):
    """Whose second run finds no memory left."""
    call, runs = differentiated(case.reference)(case, inputs), []

    def run():
        runs.append(0)
        if len(runs) > 1:
            raise torch.OutOfMemoryError
        return call()

    return run


def test_what_cannot_run_is_absent_with_its_reason():
    def providers(case, device):
        given = {"eager": differentiated(case.reference), "fastvit refuses": refuse, "refuses": refuse}
        return given | {"fastvit exhausts": exhaust, "fastvit": given["eager"]}, {"elsewhere": "for others"}

    status, shown, rows = run([TINY["attention"]()], providers)
    assert status == 0
    assert "refuses: not run: no kernel\n" in shown
    assert "0 wrong, 3 not run" in shown
    found = {row.provider: (row.ok, row.reason, row.ms_p50 is None) for row in rows}
    assert found == {
        "eager": (True, None, False),
        "refuses": (False, "no kernel", True),
        "fastvit refuses": (False, "no kernel", True),
        "fastvit exhausts": (False, "not enough memory", True),
        "fastvit": (True, None, False),
    }
    in_table = [line.split()[0] for line in shown.splitlines() if line.rstrip().endswith(" ok")]
    assert in_table == ["eager", "fastvit"]


def test_without_memory_for_the_inputs_every_provider_says_so(monkeypatch):
    def none_left(case, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(op_bench, "input_sets", none_left)
    _, _, rows = run([TINY["attention"](), TINY["patch_embed"]()])
    assert {row.op for row in rows} == {"attention", "patch_embed"}
    assert {row.reason for row in rows} == {"not enough memory"}


def test_torchs_rows_are_kept_before_ours_are_prepared(tmp_path):
    """And each of ours before the next; the baseline takes part in every one's rounds."""
    path, calls, known = tmp_path / "rows.json", [], {}

    def providers(case, device):
        def provider(name):
            def prepare(case, inputs):
                known[name] = [row.provider for row in load(path) if row.op == "attention"]
                call = differentiated(case.reference)(case, inputs)
                return lambda: (calls.append(name), call())[1]

            return prepare

        return {name: provider(name) for name in ("sdpa", "fastvit a", "compiled", "fastvit b")}, {}

    _, shown, rows = run([TINY["attention"]()], providers, path)
    assert known["compiled"] == []
    assert known["fastvit a"] == ["sdpa", "compiled"]
    assert known["fastvit b"] == ["sdpa", "compiled", "fastvit a"]
    assert [row.provider for row in load(path)[-4:]] == ["sdpa", "compiled", "fastvit a", "fastvit b"]
    assert all(row.ok and row.speed > 0 for row in rows)
    assert shown.count("attention fwd float32") == 1
    after = calls[calls.index("fastvit b") :]
    assert set(after) == {"sdpa", "fastvit b"}
    assert after[1:] == ["sdpa", "fastvit b"] * (len(after) // 2)


def test_triton_is_left_out_on_a_cpu_and_said_once():
    _, shown, _ = run([TINY["attention"](), TINY["attention"]("bwd")])
    assert shown.count("fastvit triton: left out: Triton needs a CUDA GPU") == 1


def test_control_c_keeps_what_was_measured(tmp_path):
    def providers(case, device):
        if case.direction == "bwd":
            raise KeyboardInterrupt
        return eager(case, device)

    path = tmp_path / "rows.json"
    status, shown, rows = run([TINY["attention"](direction) for direction in DIRECTIONS], providers, path)
    assert status == INTERRUPTED
    assert "stopped: " in shown
    assert {row.direction for row in rows} == {"fwd"}
    assert load(path)[-len(rows) :] == rows


def test_a_large_batch_is_judged_by_its_first_and_last_image():
    def wrong_in(image):
        def forward(case, inputs):
            (out,) = differentiated(case.reference)(case, inputs)()
            out[image] *= 1.001
            return lambda: (out,)

        outcome = op_bench.run_case(
            TINY["attention"](), {"it": forward}, CPU, op_screen.machine(), rounds=1, seconds=0
        )
        return not outcome.rows[0].ok

    assert wrong_in(0)
    assert wrong_in(-1)


def test_a_deliberately_slow_kernel_shows():
    """Which takes thrice the time, by a clock of the test's own."""
    now = [0.0]

    def takes(seconds):
        def call():
            now[0] += seconds

        return call

    timings = measure({"eager": takes(1), "slow": takes(3)}, rounds=3, clock=lambda: now[0])
    assert ratios(timings, "eager")["slow"] == pytest.approx(1 / 3)


def test_command_line(monkeypatch, tmp_path):
    path, table = tmp_path / "new" / "rows.json", tmp_path / "rows.csv"
    monkeypatch.setattr(
        bench_attention, "cases", lambda *chosen: [TINY["attention"](direction) for direction in DIRECTIONS]
    )
    monkeypatch.setattr(bench_attention, "providers", eager)

    def main(*arguments):
        how = ("bench", "ops", "--rounds", "1", "--device", "cpu", *arguments)
        return CliRunner().invoke(app, how)

    kept = ("--json", str(path), "--csv", str(table))
    done = main("attention", "--filter", "fwd float32", *kept)
    assert done.exit_code == 0, done.output
    assert {row.direction for row in load(path) if row.op == "attention"} == {"fwd"}
    assert len(table.read_text().splitlines()) == 1 + len(load(path))
    for wrong, said in (
        (("--dtype", "int8"), "unknown dtype 'int8'; the dtypes are bfloat16, float16, float32, tf32"),
        (("gelu",), "unknown op 'gelu'; the ops are patch_embed, layer_norm_linear, attention"),
        (("attention", "--filter", "nothing"), "no case's title has all of the words 'nothing'"),
        (("--fail-if-slower", "5%"), "--fail-if-slower needs --baseline FILE"),
    ):
        assert said in str(main(*wrong).exception)


def test_roofline_is_measured():
    before = torch.backends.cuda.matmul.allow_tf32
    assert roofline.peak_gbps(CPU) > 0
    assert roofline.peak_tflops(CPU, "tf32") > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
