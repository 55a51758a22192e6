"""docs/benchmarks.md says what the kept rows say, and is what they make today."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastvit_benchmarks import report
from fastvit_benchmarks.harness import Machine, Row, Timing, save

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
