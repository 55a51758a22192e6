"""The house is in order: an op has one name everywhere, and no file outgrows its idea."""

from pathlib import Path
from statistics import median

import pytest

from fastvit import ops, reference
from fastvit.backends import TABLE
from fastvit.regimes import OPS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastvit", "kernels", "benchmarks", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
COMPILED = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cpp", ".cu"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", ["fastvit/reference/{}.py", "fastvit/ops/{}.py", "tests/test_{}.py"])
def test_an_op_is_found_by_its_name(op, place):
    assert (ROOT / place.format(op)).is_file()


def test_every_list_of_ops_is_the_same_list():
    assert tuple(TABLE) == OPS
    assert set(ops.__all__) == set(reference.__all__) == set(OPS)
    assert all(getattr(ops, op).__module__ == f"fastvit.ops.{op}" for op in OPS)
    assert all(getattr(reference, op).__module__ == f"fastvit.reference.{op}" for op in OPS)


# By folder, so that a red one names the files.
@pytest.mark.parametrize("folder", FOLDERS)
def test_no_python_file_is_over_300_lines(folder):
    long = {str(path.relative_to(ROOT)): lines(path) for path in PYTHON if path.is_relative_to(ROOT / folder)}
    assert long, f"no Python file in {folder}"
    assert {name: count for name, count in long.items() if count > 300} == {}


def test_half_the_python_files_are_within_150_lines():
    assert median(map(lines, PYTHON)) <= 150


def test_no_compiled_source_is_over_400_lines():
    assert COMPILED
    assert [path.name for path in COMPILED if lines(path) > 400] == []
