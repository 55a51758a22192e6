"""The benchmarks of single ops: what they count, what they refuse to time, and what they keep."""

import io
import json
from dataclasses import fields

import pytest
import torch
from rich.console import Console

from fastvit_benchmarks import bench_attention, bench_patch_embed, op_bench, op_screen, roofline
from fastvit_benchmarks.bench_attention import Attention
from fastvit_benchmarks.bench_patch_embed import PatchEmbed
from fastvit_benchmarks.harness import Row, load
from fastvit_benchmarks.op_bench import DIRECTIONS, differentiated

CPU = torch.device("cpu")
TINY = {
    "attention": lambda direction="fwd": Attention(direction, "float32", 3, 5, 2, 4),
    "patch_embed": lambda direction="fwd": PatchEmbed(direction, "float32", 2, 4, 8, side=8),
    "bytes": lambda direction="fwd": PatchEmbed(direction, "float32", 2, 4, 8, bytes=True, side=8),
}


@pytest.fixture(autouse=True)
def _no_time_to_lose(monkeypatch):
    """The roofline is measured elsewhere, and torch.compile takes seconds a case."""
    monkeypatch.setattr(op_bench, "peak_gbps", lambda device: 100.0)
    monkeypatch.setattr(op_bench, "peak_tflops", lambda device, dtype: 2.0)
    monkeypatch.setattr(op_screen, "peak_gbps", lambda device: 100.0)


def eager(case, device):
    """The benchmarks' own providers but the compiled ones."""
    module = bench_attention if case.op == "attention" else bench_patch_embed
    given, absent = module.providers(case, device)
    return {name: provider for name, provider in given.items() if name != "compiled"}, absent


def off_by(factor):
    """Like ``eager``, with a provider whose output is wrong."""

    def providers(case, device):
        given, absent = eager(case, device)
        wrong = differentiated(lambda **inputs: factor * case.reference(**inputs))
        return given | {"wrong": wrong}, absent

    return providers


def run(cases, providers=eager, path=None):
    console = Console(file=io.StringIO(), width=200)
    status = op_screen.run(cases, providers, CPU, console, rounds=2, seconds=0.0, path=path)
    return status, console.file.getvalue()


@pytest.mark.parametrize("kind", TINY)
def test_every_row_says_all_that_it_must(kind, tmp_path):
    path = tmp_path / "rows.json"
    cases = [TINY[kind](direction) for direction in DIRECTIONS]
    status, shown = run(cases, path=path)
    rows = load(path)
    names = set(eager(cases[0], CPU)[0])
    assert status == 0
    assert "0 wrong" in shown
    assert {(row.direction, row.provider) for row in rows} == {(d, n) for d in DIRECTIONS for n in names}
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
    assert list(json.loads(path.read_text())[0]) == [field.name for field in fields(Row)]


def test_work_of_attention_is_counted():
    """Two products forward, and of the backward's five one is forward's again."""
    product = 2 * 64 * 12 * 197**2 * 64
    tensor = 64 * 197 * 12 * 64 * 2
    expected = {"fwd": (2, 4), "bwd": (5, 7), "step": (7, 8)}
    for direction, (products, tensors) in expected.items():
        case = Attention(direction, "bfloat16", 64, 197, 12, 64)
        assert (case.flops, case.bytes_moved) == (products * product, tensors * tensor)


def test_work_of_patch_embed_is_counted():
    images, tokens = 8 * 3 * 224**2, 8 * 197 * 768
    weights = 768 * (3 * 256 + 1 + 197 + 1)
    product = 2 * 8 * 196 * 768 * 768
    case = PatchEmbed("fwd", "float16", 8, 16, 768)
    assert (case.flops, case.bytes_moved) == (product, 2 * (images + tokens + weights))
    case = PatchEmbed("bwd", "float32", 8, 16, 768, bytes=True)
    assert (case.flops, case.bytes_moved) == (product, images + 4 * (tokens + weights))
    case = PatchEmbed("step", "float32", 8, 16, 768)
    assert (case.flops, case.bytes_moved) == (2 * product, 4 * (images + 2 * tokens + 2 * weights))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_provider_is_shown_without_a_time(kind, direction, tmp_path):
    path = tmp_path / "rows.json"
    status, shown = run([TINY[kind](direction)], off_by(1.001), path)
    (wrong,) = [row for row in load(path) if row.provider == "wrong"]
    assert status == 0
    assert "WRONG" in shown
    assert "1 wrong" in shown
    assert not wrong.ok
    assert wrong.error_ratio > 10
    assert {wrong.ms_p20, wrong.ms_p50, wrong.ms_p80, wrong.tflops, wrong.gbps, wrong.roofline_pct} == {None}


def test_what_cannot_run_is_absent_with_its_reason(tmp_path):
    def providers(case, device):
        def refuse(case, inputs):
            raise RuntimeError("no kernel\nfor this")

        return eager(case, device)[0] | {"refuses": refuse}, {}

    path = tmp_path / "rows.json"
    status, shown = run([TINY["attention"]()], providers, path)
    assert status == 0
    assert "refuses: not run: no kernel\n" in shown
    assert "refuses" not in {row.provider for row in load(path)}


def test_triton_is_left_out_on_a_cpu_and_said_once():
    _, shown = run([TINY["attention"](), TINY["attention"]("bwd")])
    assert shown.count("fastvit triton: left out: Triton needs a CUDA GPU") == 1


def test_control_c_keeps_what_was_measured(tmp_path):
    def providers(case, device):
        if case.direction == "bwd":
            raise KeyboardInterrupt
        return eager(case, device)

    path = tmp_path / "rows.json"
    status, shown = run([TINY["attention"](direction) for direction in DIRECTIONS], providers, path)
    assert status == op_screen.INTERRUPTED
    assert "stopped: " in shown
    assert {row.direction for row in load(path)} == {"fwd"}


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


def test_inputs_are_the_same_for_a_seed_and_others_for_another():
    for build in TINY.values():
        case = build()
        first, again, other = (case.inputs(seed, CPU) for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["grad"], other["grad"])


@pytest.mark.parametrize("module", [bench_attention, bench_patch_embed])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_is_a_handful(module, device):
    everything, quick = (
        list(module.cases(torch.device(device), quick, ("float32", "bfloat16"))) for quick in (False, True)
    )
    assert len(quick) <= 20 < len(everything)
    assert len({case.title for case in everything}) == len(everything)


def test_command_line(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"

    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["bench", "--rounds", "1", *arguments])
        with pytest.raises(SystemExit) as exit:
            op_screen.command(
                lambda *chosen: [TINY["attention"](direction) for direction in DIRECTIONS], eager
            )
        return exit.value.code

    assert main("--device", "cpu", "--filter", "fwd float32", "--json", str(path)) == 0
    assert {row.direction for row in load(path)} == {"fwd"}
    assert main("--dtype", "int8") == 2


def test_roofline_is_measured(monkeypatch):
    monkeypatch.setitem(roofline.SIZES, "cpu", (1 << 20, 64))
    before = torch.backends.cuda.matmul.allow_tf32
    assert roofline.peak_gbps.__wrapped__(CPU) > 0
    assert roofline.peak_tflops.__wrapped__(CPU, "tf32") > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
