"""docs/benchmarks.md says what the kept rows say, and is what they make today."""

import csv
import io
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.axes import Axes
from rich.console import Console
from typer.testing import CliRunner

from fastvit_benchmarks import op_screen, regression, report
from fastvit_benchmarks.columns import save_csv
from fastvit_benchmarks.gpu import report as of_the_runner
from fastvit_benchmarks.harness import Machine, Row, Timing, save
from fastvit_benchmarks.op_bench import Outcome
from fastvit_benchmarks.picture import draw

ROOT = Path(__file__).parent.parent
GPU = Machine("a CPU", 8, "A GPU", "580", "2.14.1", "3.8.0", "abc1234", "2026-01-31")
CPU = Machine("a CPU", 2, None, None, "2.14.1", None, "abc1234", "2026-01-30")


def row(provider, ms, here=GPU, **more) -> Row:
    known = {"op": "attention", "dtype": "bfloat16", "shape": (197, 12, 64), "batch": 8, "ok": ms is not None}
    timing = None if ms is None else Timing((ms, ms, ms))
    return Row.of(timing, here, **known | {"provider": provider} | more)


@pytest.fixture
def results(tmp_path):
    known = {"flops": 1e9, "bytes_moved": 1e6, "error_ratio": 1.25}
    ops = [
        row("sdpa", 2.0, **known),
        row("fastvit triton", 1.0, **known),
        row("flash", None, error_ratio=70.0),
        row("liger", 0.5, ok=False, reason="wrong: out", error_ratio=80.0),
        row("fastvit kernel", None, reason="its process died"),
    ]
    roofs = [row("torch", 1.0, op="copy", bytes_moved=3e9), row("torch", 1.0, op="matmul", flops=7e11)]
    save([*roofs, *ops], tmp_path / "a-gpu" / "attention.json")
    save([row("timm eager", 4.0, CPU, op="test_vit", shape=(3, 224, 224))], tmp_path / "cpu" / "model.json")
    (tmp_path / "a-gpu" / "stages.json").write_text('{"build": "ok"}')
    return tmp_path


def test_the_page(results):
    page = report.page(results, "benchmarks")
    assert [line for line in page.splitlines() if line.startswith("##")] == [
        "## a-gpu/attention",
        "## cpu/model",
    ]
    assert "A GPU; driver 580; torch 2.14.1; Triton 3.8.0; commit abc1234; on 2026-01-31." in page
    assert "a CPU, 2 threads; torch 2.14.1; commit abc1234; on 2026-01-30." in page
    assert "Roofline: a copy 3000 GB/s, bfloat16 products 700 TFLOP/s." in page
    what = "attention forward, bfloat16, 197x12x64, batch 8"
    assert f"| {what} | sdpa | 2 | 2 to 2 | 1.00x | 0.5 TFLOP |  |  | 1.25 |" in page
    assert "|  | fastvit triton | 1 | 1 to 1 | 2.00x | 1 TFLOP |  |  | 1.25 |" in page
    assert "|  | flash | **wrong** |  |  |  |  |  | 70 |" in page
    assert "|  | liger | **wrong** |  |  |  |  |  | 80 |" in page
    assert "|  | fastvit kernel | not run |  |  |  |  |  |  |" in page
    assert (
        "| test_vit forward, bfloat16, 3x224x224, batch 8 | timm eager | 4 | 4 to 4 | 1.00x | 2000 images |"
        in page
    )
    assert "![a-gpu/attention](benchmarks/a-gpu-attention.png)" in page


def test_speeds_are_over_the_first_that_is_right(tmp_path):
    wrong = row("sdpa", 1.0, ok=False, reason="wrong: out")
    ours = (
        row("fastvit triton", 2.0),
        row("fastvit kernel", 2.0, speed=1.5),
    )  # the clock was lower in its rounds
    save([wrong, row("compiled", 4.0), *ours], tmp_path / "a-gpu" / "attention.json")
    page = report.page(tmp_path, "benchmarks")
    assert "| fastvit triton | 2 | 2 to 2 | 2.00x |" in page
    assert "| fastvit kernel | 2 | 2 to 2 | 1.50x |" in page


def on_gpu(provider, ms, eager, timed="graph", **more) -> Row:
    timing = Timing((ms,) * 3, (eager,) * 3, timed)
    known = {"op": "attention", "dtype": "bfloat16", "shape": (197, 12, 64), "batch": 1, "ok": True}
    return Row.of(timing, GPU, **known | {"provider": provider} | more)


def apart() -> list[Row]:
    """A small call on a GPU: ours gains in a graph alone, and of another library only eager is known."""
    return [
        on_gpu("sdpa", 0.008, 0.03, speed=1.0, eager_speed=1.0),
        on_gpu("xformers", 0.09, 0.1, "wall", eager_speed=0.3),
        on_gpu("fastvit triton", 0.004, 0.1, speed=2.0, eager_speed=0.3),
    ]


def test_an_op_on_a_gpu_has_two_times_and_speeds(tmp_path):
    save([*apart(), row("late", None, batch=1, reason="its process died")], tmp_path / "gpu" / "ops.json")
    page = report.page(tmp_path, "benchmarks")
    names = "what | provider | ms | p20 to p80 | speed | eager ms | eager speed | per second"
    assert f"| {names} | roofline | MB | error |" in page
    assert "| sdpa | 0.008 | 0.008 to 0.008 | 1.00x | 0.03 | 1.00x |  |" in page
    assert "| xformers | 0.09 (wall) | 0.09 to 0.09 | 0.30x | 0.1 | 0.30x |  |" in page
    assert "| fastvit triton | 0.004 | 0.004 to 0.004 | 2.00x | 0.1 | 0.30x |  |" in page
    table = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(table)) == 1


def test_the_runner_s_page_says_both_times(tmp_path):
    save(apart(), tmp_path / "ops-attention.json")
    (line,) = of_the_runner.times(tmp_path)
    assert "sdpa 0.008 (eager 0.03), fastvit triton 0.004 2.00x (eager 0.1 0.30x)" in line
    assert "xformers 0.09 (eager 0.1 0.30x)" in line


def test_a_case_on_the_screen_says_both_times():
    case = SimpleNamespace(title="attention fwd")
    console = Console(file=io.StringIO(), width=200)
    console.print(op_screen.table(Outcome(case, apart(), defaultdict(list), {}, {})))
    _, names, sdpa, _, ours = console.file.getvalue().splitlines()[:5]
    assert names.split()[:6] == ["provider", "ms", "speed", "timed", "eager", "speed"]
    assert sdpa.split()[1:6] == ["0.008", "1.00x", "graph", "0.03", "1.00x"]
    assert ours.split()[2:7] == ["0.004", "2.00x", "graph", "0.1", "0.30x"]


def test_a_table_of_ops_has_both_times(tmp_path):
    save_csv(apart(), tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv") as file:
        found = [(row["timed"], row["ms_p50"], row["eager_ms_p50"]) for row in csv.DictReader(file)]
    assert found == [("graph", "0.008", "0.03"), ("wall", "0.09", "0.1"), ("graph", "0.004", "0.1")]


def test_the_picture_marks_eager_s_speed(tmp_path, monkeypatch):
    marked = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, *a, **how: marked.append((x, how)) or plot(self, x, *a, **how)
    )
    draw(apart(), tmp_path / "ops.png")
    assert [x for x, how in marked if how.get("marker") == "D"] == [1.0, 0.3, 0.3]


def test_times_that_were_taken_otherwise_are_not_compared():
    (*_, now), old = apart(), on_gpu("fastvit triton", 0.04, 0.1, "events")
    assert regression.changes([now], [old]) == []
    assert len(regression.changes([now], [now])) == 1


def test_pictures_lie_where_the_page_says(results, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(report.main)
    done = CliRunner().invoke(app, [str(tmp_path / "docs" / "page.md"), "--results", str(results)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "docs" / "page.md").read_text()
    links = [part.split(")")[0] for part in page.split("](")[1:]]
    assert len(links) == 2
    assert all((tmp_path / "docs" / link).is_file() for link in links)


def test_the_committed_page_is_what_the_rows_make():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == report.page(report.RESULTS, "benchmarks"), "run `make report`"
    for path in report.files(report.RESULTS):
        assert (
            ROOT / "docs" / "benchmarks" / report._picture(path.relative_to(report.RESULTS).with_suffix(""))
        ).exists()
