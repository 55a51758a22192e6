"""The stages of `make gpu`: what they run on which machine, and what they need."""

import dataclasses
import os

import click
import pytest
import typer
from test_gpu_runner import FACTS
from typer.testing import CliRunner

from fastvit import cli
from fastvit_benchmarks.gpu import __main__ as gpu
from fastvit_benchmarks.gpu import findings, runner, sanitized, stages
from fastvit_benchmarks.tables import measure_gpu
from fastvit_benchmarks.tiles import tune_tiles

BARE = dataclasses.replace(FACTS, sanitizer="", packages=(), library="it is not built", free=40.0)


def test_an_unknown_stage_is_an_error():
    app = typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(app, ["partiy"])
    assert result.exit_code == 2
    assert "unknown stage partiy" in result.stderr


def test_the_order_is_by_value():
    first = ["facts", "smoke", "parity", "ops", "ours", "baseline", "tables", "determinism", "memcheck"]
    rest = ["model", "train", "tiles", "sanitizers", "max-autotune"]
    assert [stage.name for stage in stages.STAGES] == first + rest
    gates = {stage.name for stage in stages.STAGES if stage.gate}
    assert gates == {"facts", "smoke", "parity", "determinism", "memcheck", "sanitizers"}
    programs = [command.name for stage in stages.STAGES for command in stage.commands(FACTS)]
    assert len(set(programs)) == len(programs)  # each its own log and rows
    # Less than six minutes hold all that a first run must show.
    held = list(gpu._timed(stages.STAGES[1:], 340, iter(range(0, 10000, 40)).__next__))
    assert [stage.name for stage, _ in held][:5] == first[1:6]


def test_every_program_takes_what_it_is_given():
    """Their own command lines read the words, and run nothing."""
    commands = {"fastvit.cli": typer.main.get_command(cli.app)}
    for module in (tune_tiles, measure_gpu):
        app = typer.Typer()
        app.command()(module.main)
        commands[module.__name__] = typer.main.get_command(app)
    files, read = findings.Files(gpu.ROOT, "it"), 0
    for stage in stages.STAGES:
        for one in stage.commands(FACTS):
            flag, module, *words = (*one.argv[1:], *(one.again or ()))
            if flag == "-m" and module in commands:
                command, words = commands[module], [runner._filled(word, files, 100) for word in words]
                while isinstance(command, click.Group):
                    command = command.commands[words.pop(0)]
                command.make_context(module, words)
                read += 1
    assert read == 14


def test_tests_are_selected_by_names_that_are_there():
    for name in (stages.SMOKE, *stages.REPEATS):
        path, _, test = name.partition("::")
        assert not test or f"def {test}(" in (gpu.ROOT / path).read_text(), name


@pytest.mark.parametrize(
    "name", ["tables", "model", "train", "memcheck", "sanitizers", "max-autotune", "ours"]
)
def test_stages_without_their_tool_or_package_are_absent(tmp_path, name):
    (stage,) = (stage for stage in stages.STAGES if stage.name == name)
    outcome = runner.run(stage, BARE, 1, tmp_path, os.environ, None)
    assert outcome.status == "absent"


def test_what_is_missing_is_said():
    said = " ".join(BARE.notes())
    for word in ("compute-sanitizer", "40 GB", "timm", "xdist", "it is not built"):
        assert word in said
    assert FACTS.notes() == []


def test_what_the_sanitizers_watch_runs_every_op(capsys):
    sanitized.main(device="cpu", triton="reference", compiled="reference")
    said = capsys.readouterr().out
    assert all(op in said for op in stages.OPS)
    assert said.endswith("16 calls ran\n")
