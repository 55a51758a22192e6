"""A fault put into a Triton kernel turns a check red that is green without it: a suite that can fail."""

import importlib
import importlib.util
import shutil
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
from kernel_mutants import CHECKS, MUTANTS, Mutant

import fastvit_kernels

NUMBERS = count()


def with_launchers(package: str) -> ModuleType:
    """A package of kernels, its launchers imported."""
    for name in ("attention", "patch_embed", "tiles"):
        importlib.import_module(f"{package}.{name}")
    return sys.modules[package]


def mutated(mutant: Mutant, folder: Path) -> ModuleType:
    """A copy of the kernels that has the fault in it.

    Raises:
        LookupError: the source does not hold exactly once what is to be replaced: the mutant has rotted.
    """
    package = folder / f"kernels_mutant_{next(NUMBERS)}"
    home = Path(fastvit_kernels.__file__).parent
    shutil.copytree(home, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.file} holds {source.count(mutant.old)} times, not once: {mutant.old}")
    path.write_text(source.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(package.name, package / "__init__.py")
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    return with_launchers(package.name)


@pytest.mark.parametrize("name", CHECKS)
def test_green_without_a_fault(name):
    CHECKS[name](with_launchers(fastvit_kernels.__name__))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.fault}")
def test_red_with_it(mutant, tmp_path):
    faulty = mutated(mutant, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](faulty)


def test_a_copy_without_a_fault_is_green(tmp_path):
    copy = mutated(MUTANTS[0]._replace(new=MUTANTS[0].old), tmp_path)
    assert copy.attention is not with_launchers(fastvit_kernels.__name__).attention
    CHECKS["forward"](copy)


def test_a_mutant_that_has_rotted_is_an_error(tmp_path):
    with pytest.raises(LookupError, match="0 times, not once: what no file holds"):
        mutated(MUTANTS[0]._replace(old="what no file holds"), tmp_path)
