"""The runner of `make gpu`: stages are small programs that end well, fail, die, hang or are killed."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from rich.console import Console

from fastvit_benchmarks.gpu import __main__ as gpu
from fastvit_benchmarks.gpu import findings, runner
from fastvit_benchmarks.gpu.facts import Facts
from fastvit_benchmarks.gpu.runner import Absent, Command, Stage
from fastvit_benchmarks.harness import Row, Timing, machine, save

FACTS = Facts("NVIDIA H100 80GB HBM3", (9, 0), 1, 79.0, 80.0, "", "compute-sanitizer", ("timm", "xdist"), {})
LOOK = f"open(sys.argv[1], 'w').write({json.dumps(dataclasses.asdict(FACTS))!r}); print('an H100')"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    monkeypatch.setattr(runner, "AGAIN", 0.5)


def program(name, code, *words, **how):
    return Command(name, (sys.executable, "-S", "-c", f"import os, sys, time\n{code}", *words), **how)


def stage(name, *codes, seconds=20.0, gate=False, **how):
    """A stage of these programs."""
    commands = [program(f"{name}{i or ''}", code, **how) for i, code in enumerate(codes)]
    return Stage(name, seconds, lambda facts: commands, gate)


def rows(*found, op="vit_base_patch16_224", direction="fwd"):
    facts = {"op": op, "dtype": "bfloat16", "shape": (3, 224, 224), "direction": direction}
    timed = [(provider, batch, ms and Timing((ms,))) for provider, batch, ms in found]
    return [
        Row.of(timing, machine(), provider=name, batch=batch, ok=timing is not None, **facts)
        for name, batch, timing in timed
    ]


@pytest.fixture
def go(tmp_path):
    """Runs stages; returns the exit status, what was shown, and the stages' outcomes by name."""

    def run(*wanted, seconds=60.0, **how):
        first = Stage("facts", 20, lambda facts: [program("facts", LOOK, "{rows}")], True)
        console = Console(file=io.StringIO(), width=200)
        end = time.monotonic() + seconds
        status = gpu.run([first, *wanted], tmp_path, os.environ, console, end=end, **how)
        kept = json.loads((tmp_path / FACTS.slug / "stages.json").read_text())
        return status, console.file.getvalue(), {row["stage"]: row for row in kept}

    return run


def test_a_stage_that_ends_well_and_one_that_fails(go, tmp_path):
    fails = stage("ops", "print('no kernel'); raise SystemExit(3)")
    status, shown, found = go(stage("smoke", "print('compiling'); print('all well')", gate=True), fails)
    assert status == 1
    assert (found["smoke"]["status"], found["smoke"]["found"]) == ("ok", "all well")
    assert (found["ops"]["status"], found["ops"]["reason"]) == ("failed", "exit status 3")
    assert "no kernel: exit status 3" in shown
    assert "compiling\n" in (tmp_path / FACTS.slug / "logs" / "smoke" / "log").read_text()


def test_without_a_gpu_it_ends_at_once_with_one_line():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastvit_benchmarks.gpu", "parity"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.strip() == ""
    assert done.stderr.count("\n") == 1
    assert "run this where nvidia-smi lists one" in done.stderr or "built without CUDA" in done.stderr


# A child and a grandchild, both deaf to SIGINT and SIGTERM.
HANGING = """
import signal, subprocess
deaf = "import signal\\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\\n"
exec(deaf)
child = subprocess.Popen([sys.executable, "-S", "-c", deaf + "import time; time.sleep(600)"])
open({file!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("hanging", flush=True)
{then}
"""


def dead(pid):
    """Gone, or a zombie that its new parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_hangs_is_ended_at_its_limit_with_all_its_processes(go, tmp_path):
    file, start = tmp_path / "pids", time.monotonic()
    hangs = stage("ops", HANGING.format(file=str(file), then="time.sleep(600)"), seconds=1.5)
    _, _, found = go(hangs, stage("after", "print('went on')"))
    assert time.monotonic() - start < 10
    assert (found["ops"]["status"], found["ops"]["found"]) == ("timed out", "hanging")
    assert found["after"]["status"] == "ok"
    wait_for(lambda: all(map(dead, file.read_text().split())))


def test_what_outlives_its_parent_ends_with_the_stage(go, tmp_path):
    file = tmp_path / "pids"
    go(stage("ops", HANGING.format(file=str(file), then="")))
    wait_for(lambda: dead(file.read_text().split()[1]))


def test_a_benchmark_that_is_ended_keeps_its_rows(go, tmp_path):
    save(rows(("timm eager", 1, 6.0), ("fastvit", 1, None)), tmp_path / "measured")
    code = f"os.rename({str(tmp_path / 'measured')!r}, sys.argv[1]); time.sleep(60)"
    command = program("model", code, "{rows}", read=findings.kept_rows)
    status, shown, found = go(Stage("model", 1.5, lambda facts: [command]))
    assert (found["model"]["status"], found["model"]["found"]) == (
        "timed out",
        "2 rows, 1 not right or not timed",
    )
    assert status == 0
    assert "timm eager 6" in shown
    done = Stage("model", 5.0, lambda facts: [program("model", "print('done')", read=findings.kept_rows)])
    status, _, found = go(done)  # what an earlier run kept is not this one's
    assert (status, found["model"]["reason"]) == (1, "it kept no rows")


# Notes what it is about to try, and dies of the second; what is said to be over is not tried again.
DIES = """
tried = sys.argv[1]
before = open(tried).read() if os.path.exists(tried) else ""
for name in "abc":
    if f'"{name}"' not in before:
        open(tried, "a").write(f'{{"name": "{name}", "begun": 1}}\\n')
        if name in sys.argv[2]:
            os._exit(139)
print(before.count("begun"), sys.argv[3:])
"""


@pytest.mark.parametrize(("fatal", "said"), [("b", "died 1 times"), ("ac", "died 2 times")])
def test_what_died_is_started_again_without_what_it_died_of(go, fatal, said):
    command = program("ops", DIES, "{tried}", fatal, again=("--resume",))
    for _ in range(2):  # each run begins anew
        _, _, found = go(Stage("ops", 20.0, lambda facts: [command]))
        assert found["ops"]["status"] == "failed"
        assert said in found["ops"]["reason"]
        assert "['--resume']" in found["ops"]["found"] or fatal == "ac"


def test_what_dies_of_nothing_new_is_not_started_again(go, tmp_path):
    code = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); os._exit(1)"
    go(Stage("ops", 20.0, lambda facts: [program("ops", code, again=("--resume",))]))
    assert (tmp_path / "starts").read_text() == "x"


def test_programs_of_a_stage_share_its_time(go):
    """One that hangs leaves the others theirs, and one that is quick leaves what it does not need."""
    start = time.monotonic()
    _, _, found = go(stage("ops", "time.sleep(60)", "print('quick')", "print('quick')", seconds=3.0))
    assert time.monotonic() - start < 6
    assert found["ops"]["status"] == "timed out"
    assert found["ops"]["found"].endswith("ops1 quick; ops2 quick")


def seconds_of(budget, *wanted, takes=1.0):
    """What the stages get of a budget when each takes this share of what it gets."""
    spent, given = [], {}
    for one, seconds in gpu._timed(wanted, budget, lambda: sum(spent)):
        given[one.name] = seconds
        spent.append(takes * seconds)
    return given


def test_the_budget_is_shared_so_that_what_it_holds_is_reached():
    a, b, c, d = (stage(name, "", seconds=100.0) for name in "abcd")
    assert seconds_of(250, a, b, c, d) == {"a": 100, "b": 80, "c": 70}
    assert seconds_of(250, a, b, c, d, takes=0.5) == {"a": 100, "b": 100, "c": 100, "d": 100}
    assert seconds_of(30, a, b) == {"a": 30}  # the first is begun whatever there is
    assert seconds_of(75, a, b) == {"a": 75}


def test_what_is_not_reached_is_said_and_an_unreached_gate_fails(go):
    slow = stage("parity", "time.sleep(1); print('1 passed')", seconds=4.0)
    status, shown, found = go(slow, stage("last", "print('last')", seconds=40.0), seconds=8.0)
    assert set(found) == {"facts", "parity"}
    assert "not reached" in shown
    assert status == 0
    assert go(slow, stage("last", "print('last')", seconds=40.0, gate=True), seconds=8.0)[0] == 1


@pytest.mark.parametrize("gate", [False, True])
def test_an_absent_tool_is_no_failure(go, gate):
    def commands(facts):
        raise Absent("the tool is not here")

    status, shown, found = go(Stage("sanitizers", 20.0, commands, gate))
    assert (status, found["sanitizers"]["status"]) == (0, "absent")
    assert "the tool is not here" in shown


def test_the_archive_is_whole_whenever_the_run_ends(go, tmp_path):
    archive = tmp_path / "out" / "day.tgz"
    names = []
    peek = stage("peek", f"print(os.path.exists({str(archive)!r}))")
    _, _, found = go(stage("smoke", "print('well')"), peek, archive=archive)
    assert found["peek"]["found"] == "True"
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    inside = f"benchmarks/results/{FACTS.slug}"
    assert {f"{inside}/stages.json", f"{inside}/report.txt", f"{inside}/logs/smoke/log"} <= set(names)
    assert "kernels/tiles/sm_90.json" in names
    assert [path.name for path in archive.parent.iterdir()] == ["day.tgz"]


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from rich.console import Console
from test_gpu_runner import HANGING, LOOK, Stage, gpu, program, runner, stage
runner.GRACE = 0.5
signal.signal(signal.SIGTERM, gpu._interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
first = Stage("facts", 20, lambda facts: [program("facts", LOOK, "{{rows}}")])
hangs = stage("ops", HANGING.format(file={file!r}, then="time.sleep(600)"))
wanted = first, hangs, stage("model", "print('never')")
sys.exit(gpu.run(wanted, Path({folder!r}), os.environ, Console(width=150), end=time.monotonic() + 60))
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


def test_one_environment_for_all_without_the_user_s_choices(monkeypatch):
    monkeypatch.setenv("FASTVIT_BACKEND", "reference")
    found = runner.environment()
    assert "FASTVIT_BACKEND" not in found
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS"} <= found.keys()


def test_a_tuner_is_told_its_time_and_its_files(go, tmp_path):
    words = ("{seconds}", "{rows}", "{tried}", "--keep={logs}")
    code = "print([word.rpartition('/')[2] for word in sys.argv[1:]])"
    _, _, found = go(Stage("t", 10.0, lambda facts: [program("it", code, *words)]))
    assert found["t"]["found"] == str(["9", "it.json", "it.tried", "it"])
