"""`make gpu` without a GPU: stages are small programs that end well, fail, hang or are killed."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from stage_programs import FACTS, HANGING, STATE, absent, dead, one, rows, stage, wait_for

from fastvit_benchmarks.gpu import __main__ as gpu
from fastvit_benchmarks.gpu import findings, stage_runner, supervised
from fastvit_benchmarks.gpu.ledger import Ledger, Record
from fastvit_benchmarks.gpu.stage_runner import Command, Stage
from fastvit_benchmarks.harness import save


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(supervised, "GRACE", 0.5)
    monkeypatch.setattr(supervised, "POLL", 0.01)


@pytest.fixture
def go(tmp_path):
    """Runs stages; returns the exit status, what was shown, and the ledger."""

    def run(*table, facts=FACTS, limit=60.0, **how):
        console = Console(file=io.StringIO(), width=150)
        status = gpu.run(facts, table, tmp_path, console, limit=limit, **how)
        return status, console.file.getvalue(), Ledger.load(tmp_path / "stages.json").records

    return run


def test_a_stage_that_ends_well(go, tmp_path):
    status, shown, records = go(stage("build", "print('compiling'); print('built for sm_90a')"))
    record = records["build"]
    assert status == 0
    assert (record.status, record.found, record.reason, record.state) == ("ok", "built for sm_90a", "", STATE)
    assert "compiling\n" in shown  # as it comes, and in the log
    assert "compiling\n" in (tmp_path / "logs" / "build.log").read_text()


@pytest.mark.parametrize("gate", [False, True])
def test_a_stage_that_fails(go, gate):
    status, shown, records = go(stage("ops", "print('no kernel'); raise SystemExit(3)", gate=gate))
    assert status == 1
    assert (records["ops"].status, records["ops"].reason) == ("failed", "exit status 3")
    assert "no kernel: exit status 3" in shown


def test_a_program_that_a_signal_ends(tmp_path):
    result = one("import os; os.kill(os.getpid(), 9)")(tmp_path)
    assert (result.status, result.reason) == ("failed", "ended by SIGKILL")


def test_a_stage_that_hangs_is_ended_at_its_limit_with_all_its_processes(go, tmp_path):
    file = tmp_path / "pids"
    start = time.monotonic()
    hanging = stage("ops", HANGING.format(file=str(file), then="time.sleep(600)"), limit=1.5)
    _, _, records = go(hanging, stage("after", "print('went on')"))
    assert time.monotonic() - start < 10
    assert (records["ops"].status, records["ops"].found) == ("timed out", "hanging")
    assert records["after"].status == "ok"
    pids = file.read_text().split()
    wait_for(lambda: all(map(dead, pids)))


def test_what_outlives_its_parent_ends_with_the_stage(go, tmp_path):
    file = tmp_path / "pids"
    go(stage("ops", HANGING.format(file=str(file), then="")))
    _, child = file.read_text().split()
    wait_for(lambda: dead(child))


def test_a_benchmark_that_is_ended_keeps_its_rows(go, tmp_path):
    save(rows(("timm eager", 1, 6.0), ("fastvit", 1, None)), tmp_path / "measured")
    code = f"import os, time; os.rename({str(tmp_path / 'measured')!r}, 'ROWS'); time.sleep(60)"
    code = code.replace("'ROWS'", repr(str(tmp_path / "model.json")))
    status, _, records = go(stage("model", code, limit=1.0, read=findings.kept_rows))
    assert (records["model"].status, records["model"].found) == ("timed out", "2 rows, 1 wrong")
    assert status == 0


def test_a_benchmark_that_keeps_nothing_has_failed(go, tmp_path):
    save(rows(("timm eager", 1, 6.0)), tmp_path / "model.json")  # of an earlier run
    status, _, records = go(stage("model", "print('done')", read=findings.kept_rows))
    assert status == 1
    assert (records["model"].status, records["model"].reason) == ("failed", "it kept no rows")


def test_programs_of_a_stage_share_its_time(go):
    """One that hangs leaves the others theirs, and one that is quick leaves what it does not need."""
    hangs, quick = "import time; time.sleep(60)", "print('quick')"
    start = time.monotonic()
    _, _, records = go(stage("ops", hangs, quick, quick, limit=3.0))
    assert 0.9 < time.monotonic() - start < 3
    assert records["ops"].status == "timed out"
    assert records["ops"].found == "ops1 quick; ops2 quick"


def test_what_is_done_is_not_run_again(go, tmp_path):
    count = tmp_path / "count"
    done = stage("build", f"open({str(count)!r}, 'a').write('x'); print('built')")
    failing = stage("parity", f"open({str(count)!r}, 'a').write('y'); raise SystemExit(1)")
    assert go(done, failing)[0] == 1
    status, shown, _ = go(done, failing)
    assert count.read_text() == "xyy"  # what failed is
    assert status == 1
    assert "built" in shown
    go(done, failing, only=["build"])  # by name, even if it is done
    assert count.read_text() == "xyyx"
    go(done, failing, facts=dataclasses.replace(FACTS, fresh=True))
    assert count.read_text() == "xyyxxy"


@pytest.mark.parametrize(
    "change", [{"commit": "def5678"}, {"sources": "other"}, {"versions": {"torch": "2.11.0"}}], ids=str
)
def test_other_sources_or_versions_run_again(go, tmp_path, change):
    count = tmp_path / "count"
    done = stage("build", f"open({str(count)!r}, 'a').write('x')")
    go(done)
    go(done, facts=dataclasses.replace(FACTS, state=dataclasses.replace(STATE, **change)))
    assert count.read_text() == "xx"


def test_what_does_not_fit_into_the_total_is_not_reached_and_comes_next(go):
    slow = stage("parity", "import time; time.sleep(1); print('1 passed')", gate=True)
    long, short = stage("ops", "print('ops')", limit=40.0), stage("last", "print('last')", limit=4.0)
    gate = stage("sanitizers", "print('clean')", limit=40.0, gate=True)
    status, shown, records = go(slow, long, gate, short, limit=6.0)
    assert set(records) == {"parity", "last"}
    assert "not reached" in shown
    assert status == 1  # a gate among it has not been passed
    assert go(slow, long, short, limit=6.0)[0] == 0
    status, shown, records = go(slow, long, gate, short)
    assert (status, len(records)) == (0, 4)
    assert "not reached" not in shown


def test_the_total_ends_the_stage_under_way(go):
    start = time.monotonic()
    status, _, records = go(stage("ops", "import time; time.sleep(60)", limit=50.0), limit=1.0)
    assert time.monotonic() - start < 5
    assert (status, records["ops"].status) == (1, "timed out")  # and it has kept nothing


@pytest.mark.parametrize("gate", [False, True])
def test_an_absent_tool_is_no_failure(go, gate):
    status, shown, records = go(absent("sanitizers", gate))
    assert (status, records["sanitizers"].status) == (0, "absent")
    assert "the tool is not here" in shown


@pytest.mark.parametrize("text", ["{", '[{"stage": "parity"}]', '{"a": 1}', "[1]", "\xff"])
def test_a_broken_ledger_is_said_and_begun_anew(go, tmp_path, text):
    (tmp_path / "stages.json").write_bytes(text.encode("latin-1"))
    status, shown, records = go(stage("build", "print('built')"))
    assert "is no ledger" in shown
    assert (status, list(records)) == (0, ["build"])


def test_the_ledger_is_whole_whenever_it_is_ended(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "stages.json")
    record = Record("build", "ok", 1.0, "built", "", STATE, "2026-01-31")
    ledger.add(record)
    before = ledger.path.read_text()

    def torn(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", torn)
    with pytest.raises(KeyboardInterrupt):
        ledger.add(dataclasses.replace(record, stage="parity"))
    assert ledger.path.read_text() == before
    assert json.loads(before)[0]["state"]["commit"] == "abc1234"


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
import signal
from pathlib import Path
from rich.console import Console
from fastvit_benchmarks.gpu import __main__ as gpu, supervised
from stage_programs import FACTS, HANGING, stage
supervised.GRACE = 0.5
signal.signal(signal.SIGTERM, gpu._interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
hanging = stage("ops", HANGING.format(file={file!r}, then="time.sleep(600)"))
table = (stage("build", "print('built')"), hanging, stage("model", "print('never')"))
sys.exit(gpu.run(FACTS, table, Path({folder!r}), Console(width=150), limit=60))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_control_c_ends_with_the_summary_and_the_stage_s_processes(tmp_path, how):
    file = tmp_path / "pids"
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), file=str(file), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: file.exists() and len(file.read_text().split()) == 2, 60)
    process.send_signal(how)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in shown
    assert "not reached" in shown
    assert "never" not in shown
    wait_for(lambda: all(map(dead, file.read_text().split())))
    assert list(Ledger.load(tmp_path / "stages.json").records) == ["build"]


def test_the_user_s_choices_are_not_what_is_measured(go, monkeypatch):
    monkeypatch.setenv("FASTVIT_BACKEND", "reference")
    _, _, records = go(stage("ops", "import os; print(os.environ.get('FASTVIT_BACKEND', 'unset'))"))
    assert records["ops"].found == "unset"


def test_a_tuner_is_told_its_time_and_its_file(tmp_path):
    command = Command("it", (sys.executable, "-c", "import sys; print(sys.argv[1:])", "{seconds}", "{rows}"))
    result = stage_runner.run(Stage("s", 10, lambda facts: [command]), FACTS, 10, tmp_path, io.StringIO())
    assert result.found == str(["9", str(tmp_path / "it.json")])
