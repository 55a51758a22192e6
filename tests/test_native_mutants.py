"""A fault put into the C++ of the compiled ops turns a check red that is green without it."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_checks import CHECKS
from native_mutants import MUTANTS, Mutant

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
sys.path.insert(0, str(CSRC))
import libraries  # noqa: E402

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (looked for c++, g++, clang++)")
SOURCES = (*libraries.SHARED, *libraries.CPU, *(f"{name}.cpp" for name in libraries.LOOPS))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Builder:
    """Compiles the sources once, and for a mutant those again that its file is part of.

    One level of vectors, and hardly optimised: a third of the time, and the same faults.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, torch = folder, libraries.torch_folder()
        flags = [flag for flag in libraries.FLAGS if flag not in ("-O3", "-Wall", "-Wextra")]
        flags += ["-Og", *libraries.LOOP_FLAGS, "-DFASTVIT_LEVEL=base"]
        self.compiling = [COMPILER, *flags, *libraries.Tools(COMPILER, torch).include, "-c"]
        self.libraries = [f"-L{torch / 'lib'}", "-Wl,--no-undefined", "-ltorch_cpu", "-lc10"]
        self.objects = {name: folder / f"{name}.o" for name in SOURCES}

    def compile(self, folder: Path, name: str, to: Path) -> None:
        _run([*self.compiling, str(folder / name), "-o", str(to)])

    def link(self, folder: Path, objects: dict[str, Path]) -> Path:
        folder.mkdir(exist_ok=True)
        library = folder / "_fastvit_cpu.so"
        _run([COMPILER, "-shared", "-o", str(library), *map(str, objects.values()), *self.libraries])
        return library

    def mutated(self, number: int, mutant: Mutant) -> Path:
        """The library with the fault in it.

        Raises:
            LookupError: the source does not hold exactly once what is to be replaced: the mutant has rotted.
        """
        source = (CSRC / mutant.file).read_text()
        if source.count(mutant.old) != 1:
            raise LookupError(f"{mutant.file} holds {source.count(mutant.old)} times, not once: {mutant.old}")
        copy = self.folder / str(number)
        shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("*.cu*", "__pycache__"))
        (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        altered = {name: copy / f"{name}.o" for name in SOURCES if mutant.file in _parts(name)}
        for name, to in altered.items():
            self.compile(copy, name, to)
        return self.link(copy, self.objects | altered)


def _parts(name: str) -> set[str]:
    """The file and what it includes."""
    included = re.findall(r'^#include "(.*)"', (CSRC / name).read_text(), re.MULTILINE)
    return {name}.union(*map(_parts, included))


def judged(cases: list[tuple[Path, str]]) -> list[str]:
    """The verdict on each library by each check."""
    lines = "".join(f"{library}\t{check}\n" for library, check in cases)
    command = [sys.executable, str(TESTS / "native_checks.py")]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, cwd=TESTS)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == len(cases), done.stderr
    return verdicts


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    builder = Builder(tmp_path_factory.mktemp("mutants"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: builder.compile(CSRC, name, builder.objects[name]), SOURCES))
    return builder


# Judged together, because a process that has torch in it costs seconds.
@pytest.fixture(scope="module")
def without_a_fault(builder):
    library = builder.link(builder.folder / "whole", builder.objects)
    return dict(zip(CHECKS, judged([(library, check) for check in CHECKS]), strict=True))


@pytest.fixture(scope="module")
def with_it(builder, request):
    asked = [item.callspec.params["mutant"] for item in request.session.items if "mutant" in _params(item)]
    mutants = [mutant for mutant in MUTANTS if mutant in asked]
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(builder.mutated, range(len(mutants)), mutants))
    checks = [mutant.check for mutant in mutants]
    return dict(zip(mutants, judged(list(zip(libraries, checks, strict=True))), strict=True))


def _params(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.parametrize("check", CHECKS)
def test_green_without_a_fault(check, without_a_fault):
    assert without_a_fault[check] == "green"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.fault}")
def test_red_with_it(mutant, with_it):
    assert with_it[mutant].startswith("red: ")


def test_a_mutant_that_has_rotted_is_an_error(builder):
    with pytest.raises(LookupError, match="0 times, not once: what no file holds"):
        builder.mutated(-1, MUTANTS[0]._replace(old="what no file holds"))


def test_every_check_kills():
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant[:4] for mutant in MUTANTS}) == len(MUTANTS)
