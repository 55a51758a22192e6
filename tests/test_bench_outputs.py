"""What a benchmark leaves behind: files, a picture, and whether ours became slower than a baseline."""

import csv
import io

import pytest
from matplotlib.image import imread
from rich.console import Console

from fastvit_benchmarks import columns, outputs, picture, regression
from fastvit_benchmarks.commands import share
from fastvit_benchmarks.harness import Machine, Row, Timing, load, machine, save
from fastvit_benchmarks.outputs import Outputs

HERE = machine()
MODEL = "vit_tiny_patch16_224"


def row(provider="fastvit", ms=10.0, op=MODEL, here=HERE, **more) -> Row:
    known = {"op": op, "dtype": "float32", "shape": (3, 224, 224), "batch": 4, "ok": True, "flops": 8e9}
    timing = None if ms is None else Timing((0.9 * ms, ms, 1.2 * ms))
    return Row.of(timing, here, **known | {"provider": provider} | more)


def finish(now, then=None, slower=None, path=None):
    """The status of a run with these rows, and what it says."""
    console = Console(file=io.StringIO(), width=200)
    if then is not None:
        save(then, path)
    kept = Outputs(baseline=path if then is not None else None, slower=slower)
    kept.keep(now)
    return kept.finish(console), console.file.getvalue()


EAGER = row("timm eager", 20.0)


@pytest.mark.parametrize(
    ("eager", "ours", "status"),
    [
        (20.0, 10.0, 0),
        (20.0, 10.4, 0),
        (20.0, 10.6, 1),  # a kernel that has become slower
        (26.0, 13.0, 0),  # a machine that is slower today: eager is too
        (15.0, 10.0, 0),  # torch has become faster, ours is as it was
        (20.0, None, 1),  # wrong now
    ],
)
def test_fail_if_slower(eager, ours, status, tmp_path):
    now = [row("timm eager", eager), row(ms=ours, ok=ours is not None)]
    found, said = finish(now, [EAGER, row()], 0.05, tmp_path / "before.json")
    assert found == status
    assert ("WRONG" in said) == (ours is None)


def test_one_of_ours_that_is_absent_fails_and_one_that_was_not_asked_for_does_not(tmp_path):
    then = [EAGER, row(), row(op="vit_small_patch16_224", ms=30.0)]
    status, said = finish([EAGER], then, 0.05, tmp_path / "before.json")
    assert status == 1
    assert "absent" in said
    assert "vit_small" not in said
    assert finish([EAGER, row()], then, 0.05, tmp_path / "before.json")[0] == 0


def test_what_does_not_run_any_more_fails(tmp_path):
    now = [EAGER, row(ms=None, ok=False, reason="not enough memory")]
    status, said = finish(now, [EAGER, row()], 0.05, tmp_path / "before.json")
    assert status == 1
    assert "NOT RUN" in said
    assert "2 rows, 0 wrong, 1 not run" in said


def test_a_wrong_time_is_nobodys_measure(tmp_path):
    """timm eager was right at 20 ms; today it is wrong, whatever it takes, and the next is compared with."""
    then = [row("timm eager", 20.0), row()]
    now = [
        row("timm eager", 80.0, ok=False, reason="wrong: output"),
        row("timm compiled", 20.0),
        row(ms=12.0),
    ]
    assert finish(now, then, 0.05, tmp_path / "before.json")[0] == 1


@pytest.mark.parametrize(("speed", "status"), [(2.0, 0), (1.7, 1)])
def test_ours_is_held_against_the_first_of_its_own_rounds(speed, status, tmp_path):
    """Whose row is of other rounds, when the machine was faster."""
    then, now = [EAGER, row(speed=2.0)], [row("timm eager", 18.0), row(ms=12.0, speed=speed)]
    assert finish(now, then, 0.05, tmp_path / "before.json")[0] == status


def test_others_may_become_slower(tmp_path):
    assert finish([row("timm eager", 40.0)], [EAGER], 0.05, tmp_path / "before.json")[0] == 0


def test_without_a_limit_slower_is_shown_alone(tmp_path):
    status, said = finish([EAGER, row(ms=15.0)], [EAGER, row()], None, tmp_path / "before.json")
    assert status == 0
    assert "+50.0%" in said


def test_a_baseline_of_another_machine_is_refused(tmp_path):
    there = Machine("another CPU", 8, None, None, "2.14.1", None, None, "2026-01-31")
    save([row(here=there)], tmp_path / "before.json")
    with pytest.raises(ValueError, match=r"was measured on another CPU, 8 threads, and this is"):
        Outputs(baseline=tmp_path / "before.json")


@pytest.mark.parametrize("text", ["{", "[1]", '{"op": 1}', '[{"op": "x", "shape": []}]'])
def test_a_baseline_that_is_none_is_refused(text, tmp_path):
    path = tmp_path / "before.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"before\.json"):
        Outputs(baseline=path)


@pytest.mark.parametrize(("text", "part"), [("5%", 0.05), ("7.5", 0.075), (None, None)])
def test_percent(text, part):
    assert share(text) == pytest.approx(part)


@pytest.mark.parametrize("text", ["", "five", "-1%", "nan", "inf%"])
def test_what_is_no_percentage(text):
    with pytest.raises(ValueError, match=r"is not a percentage: write --fail-if-slower 5%"):
        share(text)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: name a file"):
        Outputs(json=tmp_path)


def test_rows_are_in_the_file_as_soon_as_they_are_kept(tmp_path):
    kept = Outputs(json=tmp_path / "a" / "rows.json", csv=tmp_path / "rows.csv")
    kept.keep([EAGER])
    assert load(tmp_path / "a" / "rows.json") == [EAGER]
    kept.keep([row()])
    assert load(tmp_path / "a" / "rows.json") == [EAGER, row()]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["rows.json"]


def test_a_row_takes_the_place_of_an_earlier_one(tmp_path):
    kept = Outputs(json=tmp_path / "rows.json")
    kept.keep([EAGER, row()])
    again = Outputs(json=tmp_path / "rows.json", resume=True)
    again.keep([row("fastvit cpp"), row("timm eager", 30.0), row("timm eager", 1.0, batch=8)])
    found = [(kept.provider, kept.batch, kept.ms_p50) for kept in load(tmp_path / "rows.json")]
    assert found == [("timm eager", 4, 30), ("fastvit", 4, 10), ("fastvit cpp", 4, 10), ("timm eager", 8, 1)]
    Outputs(json=tmp_path / "rows.json").keep([EAGER])
    assert load(tmp_path / "rows.json") == [EAGER]


def test_who_lacks_a_row_runs_beside_the_baseline():
    kept = Outputs()
    kept.keep([EAGER, row(), row(direction="bwd")])
    fwd, both = [EAGER.call], [EAGER.call, row(direction="bwd").call]
    assert kept.lacking(fwd, ["timm eager", "fastvit"]) == []
    assert kept.lacking(fwd, ["timm eager", "fastvit", "fastvit cpp"]) == ["timm eager", "fastvit cpp"]
    assert kept.lacking(both, ["timm eager", "fastvit"]) == ["timm eager"]
    assert kept.lacking(fwd, ["fastvit", "fastvit cpp"]) == ["fastvit cpp"]


def test_to_go_on_needs_rows_of_this_machine(tmp_path):
    with pytest.raises(ValueError, match=r"--resume needs --json FILE"):
        Outputs(resume=True)
    there = Machine("another CPU", 8, None, None, "2.14.1", None, None, "2026-01-31")
    save([row(here=there)], tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"was measured on another CPU, 8 threads, and this is"):
        Outputs(json=tmp_path / "rows.json", resume=True)


def test_models_have_timms_columns(tmp_path):
    lost = row(ms=None, ok=False, reason="its process died")
    columns.save_csv([row(op="copy"), row(), lost], tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv") as file:
        found, wrong = csv.DictReader(file)
    assert found["model"] == MODEL
    assert float(found["infer_samples_per_sec"]) == 400
    assert float(found["infer_step_time"]) == 10
    assert (found["infer_batch_size"], found["infer_img_size"]) == ("4", "224")
    assert float(found["infer_gmacs"]) == 1
    assert float(found["param_count"]) == pytest.approx(5.72, abs=0.01)
    assert (wrong["ok"], wrong["reason"], wrong["infer_samples_per_sec"]) == ("False", "its process died", "")


def test_training_has_timms_columns(tmp_path):
    columns.save_csv([row(direction="step")], tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv") as file:
        (found,) = csv.DictReader(file)
    assert float(found["train_samples_per_sec"]) == 400
    assert "train_gmacs" not in found


def test_the_picture_shows_every_provider_that_has_a_time(tmp_path, monkeypatch):
    shown = []
    draw_bars = picture._draw_bars
    monkeypatch.setattr(picture, "_draw_bars", lambda *how: (shown.append(how[1:]), draw_bars(*how)))
    wrong = row("wrong", 1.0, ok=False, reason="wrong: output")
    ops = [row(name, op="attention", bytes_moved=1e6) for name in ("sdpa", "fastvit triton")]
    roofs = [row("torch", op="copy", bytes_moved=1e9), row("torch", op="matmul", flops=1e12)]
    lost = row("fastvit triton", None, ok=False, reason="its process died")
    picture.draw([*roofs, wrong, EAGER, row(), lost, *ops], tmp_path / "rows.png")
    assert [(op, [[r.provider for r in rows] for rows in groups]) for op, groups in shown] == [
        (MODEL, [["timm eager", "fastvit"]]),
        ("attention", [["sdpa", "fastvit triton"]]),
    ]
    assert imread(tmp_path / "rows.png").std() > 0.01


def test_nothing_to_draw_draws_nothing(tmp_path):
    picture.draw([row(op="copy", bytes_moved=1e9), row(ms=None, ok=False)], tmp_path / "rows.png")
    assert not (tmp_path / "rows.png").exists()


def test_after_control_c_the_status_says_so(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    kept = Outputs(png=tmp_path / "rows.png")
    kept.keep([EAGER, row()])
    assert kept.finish(console, stopped=True) == outputs.INTERRUPTED
    assert "stopped: 2 rows, 0 wrong; kept in" in console.file.getvalue()
    assert (tmp_path / "rows.png").exists()


def test_only_ours_are_compared():
    assert [change.now.provider for change in regression.changes([EAGER, row()], [EAGER, row()])] == [
        "fastvit"
    ]
