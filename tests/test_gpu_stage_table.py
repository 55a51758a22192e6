"""The stages of `make gpu`: what they run on which machine, what they read from it, and what they need."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from stage_programs import FACTS, one, rows
from typer.testing import CliRunner

from fastvit import cli
from fastvit_benchmarks.gpu import __main__ as gpu
from fastvit_benchmarks.gpu import findings, preflight, sanitized, stage_runner, stages
from fastvit_benchmarks.tables import measure_gpu
from fastvit_benchmarks.tiles import tune_tiles

FACTS_TO_BUILD = dataclasses.replace(FACTS, library="it is not built")


def test_without_a_gpu_it_ends_at_once_with_one_line():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastvit_benchmarks.gpu", "parity"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "run this where nvidia-smi lists one" in done.stderr or "built without CUDA" in done.stderr


def test_an_unknown_stage_is_an_error():
    app = typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(app, ["partiy"])
    assert result.exit_code == 2
    assert "unknown stage partiy" in result.stderr


def argvs(name, facts=FACTS):
    (found,) = (entry for entry in stages.STAGES if entry.name == name)
    return [" ".join(command.argv) for command in found.commands(facts)]


def test_the_table():
    names = [entry.name for entry in stages.STAGES]
    assert names == list(dict.fromkeys(names))
    # What is wrong is not timed; baselines before tuning; tables measure tiles, and `auto` goes by tables.
    order = ("build", "parity", "baseline", "tiles", "parity-of-tiles", "tables", "model", "max-autotune")
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    gates = {entry.name for entry in stages.STAGES if entry.gate}
    assert gates == {"build", "parity", "determinism", "parity-of-tiles", "sanitizers"}
    programs = [c for entry in stages.STAGES if entry.name != "build" for c in entry.commands(FACTS)]
    assert len({command.name for command in programs}) == len(programs)  # each its own log and rows
    assert all(Path(c.argv[0]).name in (Path(sys.executable).name, "compute-sanitizer") for c in programs)


def test_every_program_takes_what_it_is_given():
    """Their own command lines read the words, and run nothing."""
    known = {"{seconds}": "100", "{rows}": "rows.json"}
    programs = [c.argv[1:] for entry in stages.STAGES for c in entry.commands(FACTS_TO_BUILD)]
    commands = {"fastvit.cli": typer.main.get_command(cli.app)}
    for module in (tune_tiles, measure_gpu):
        app = typer.Typer()
        app.command()(module.main)
        commands[module.__name__] = typer.main.get_command(app)
    read = 0
    for flag, module, *words in programs:
        if flag == "-m" and module in commands:
            command, words = commands[module], [known.get(word, word) for word in words]
            while isinstance(command, click.Group):
                command = command.commands[words.pop(0)]
            command.make_context(module, words)
            read += 1
    assert read == 14


def test_what_this_machine_cannot_show_is_left_out_by_name():
    (two,) = argvs("parity", dataclasses.replace(FACTS, gpus=2))
    (single,) = argvs("parity")
    (small,) = argvs("parity", dataclasses.replace(FACTS, total=24.0, capability=(8, 9)))
    assert "--need-gpu" in two
    assert "of_its_tensors" not in two
    assert "--deselect=tests/gpu/test_streams_and_graphs.py::test_runs_on_the_gpu_of_its_tensors" in single
    assert "test_large" not in single
    assert "--deselect=tests/gpu/test_large.py::test_attention" in small
    assert "--deselect=tests/gpu/test_fc1_parity.py " in f"{small} "
    deselected = [word.partition("=")[2] for word in small.split() if word.startswith("--deselect")]
    for name in deselected:
        path, _, test = name.partition("::")
        assert not test or f"def {test}(" in (preflight.ROOT / path).read_text(), name


def test_the_build_is_for_this_gpu_and_only_where_it_is_needed(tmp_path):
    (entry,) = (entry for entry in stages.STAGES if entry.name == "build")
    assert stage_runner.run(entry, FACTS, 1, tmp_path, io.StringIO()).status == "ok"
    setup, _ = entry.commands(FACTS_TO_BUILD)
    assert setup.env == {"FASTVIT_CUDA": "1", "FASTVIT_CUDA_ARCHS": "90a"}
    assert setup.argv[0] == sys.executable


def test_stages_without_their_tool_or_package_are_absent(tmp_path):
    bare = dataclasses.replace(FACTS, sanitizer=None, packages=frozenset(), nvcc=None, cutlass=False, free=40)
    absent = {
        entry.name
        for entry in stages.STAGES
        if entry.name in ("sanitizers", "tables", "model", "train", "compare", "max-autotune", "baseline")
        and stage_runner.run(entry, bare, 1, tmp_path, io.StringIO()).status == "absent"
    }
    assert len(absent) == 7
    assert "-n" not in argvs("determinism", bare)[0].split()
    said = " ".join(dataclasses.replace(bare, library="it is not built").notes())
    for word in ("nvcc", "compute-sanitizer", "CUTLASS", "40 GB", "timm", "xdist"):
        assert word in said
    assert FACTS.notes() == []


@pytest.mark.parametrize(
    ("log", "status", "found", "reason"),
    [
        ("= 812 passed in 60.1s =", "ok", "812 passed", ""),
        ("= 809 passed, 3 skipped in 60.1s (0:01:00) =", "failed", "809 passed, 3 skipped", "3 skipped"),
        ("= 4 deselected in 0.1s =", "failed", "4 deselected", "no test passed"),
        ("collecting ...", "failed", "", "no test passed"),
        ("SKIPPED [2] no Hopper in 2s\n= 5 passed, 1 xfailed in 2.00s =", "ok", "5 passed, 1 xfailed", ""),
    ],
)
def test_a_skipped_test_fails_the_stage(tmp_path, log, status, found, reason):
    result = one(f"print({log!r})", read=findings.tests)(tmp_path)
    assert (result.status, result.found, result.reason) == (status, found, reason)


def test_a_sanitizer_must_have_come_to_its_end(tmp_path):
    def result(log, code=0):
        return one(f"print({log!r}); raise SystemExit({code})", read=findings.sanitized)(tmp_path)

    clean = "16 calls ran\n========= ERROR SUMMARY: 0 errors"
    assert (result(clean).status, result(clean).found) == ("ok", "0 errors")
    assert result(clean, 99).status == "failed"
    assert result("========= ERROR SUMMARY: 0 errors").status == "failed"
    assert result("16 calls ran").status == "failed"


def test_figures_compare_ours_with_eager_and_with_the_compiler():
    model = rows(
        ("timm eager", 8, 6.0), ("timm compiled", 8, 3.0), ("onnxruntime", 8, 2.5), ("fastvit", 8, 2.0)
    )
    model += rows(("fastvit graphed", 8, 1.5), ("fastvit triton", 8, None))
    op = rows(("sdpa", 1, 1.0), ("compiled", 1, 1.0), ("fastvit triton", 1, 0.5), op="attention")
    op += rows(("sdpa", 64, 8.0), ("fastvit triton", 64, 1.0), op="attention")
    of_model, of_op = findings.figures(model + op)
    assert (of_model.provider, of_model.ms, of_model.batch) == ("fastvit graphed", 1.5, "8")
    assert (of_model.over_eager, of_model.over_compiled) == (4.0, 2.0)
    assert (of_op.over_eager, of_op.over_compiled, of_op.ms) == (pytest.approx(4.0), 2.0, None)


def test_names_of_gpus():
    assert preflight.slug("NVIDIA H100 80GB HBM3") == FACTS.slug == "h100-80gb-hbm3"
    assert preflight.slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_sources_are_what_is_run_and_not_the_tables(tmp_path):
    (tmp_path / "setup.py").touch()
    for folder in preflight.SOURCES:
        (tmp_path / folder).mkdir(parents=True)
    first = preflight.sources(tmp_path)
    (tmp_path / "kernels" / "tiles.json").write_text("{}")
    assert preflight.sources(tmp_path) == first
    (tmp_path / "csrc" / "a.cu").write_text("x")
    assert preflight.sources(tmp_path) != first


def test_what_the_sanitizers_watch_runs_every_op(capsys):
    sanitized.main(device="cpu", triton="reference", compiled="reference")
    said = capsys.readouterr().out
    assert all(op in said for op in stages.OPS)
    assert said.endswith("16 calls ran\n")
