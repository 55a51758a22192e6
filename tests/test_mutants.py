"""A fault put into our own source turns a check red that is green without it: a suite that can fail."""

import importlib
import importlib.util
import shutil
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
from mutants import CHECKS, LAYER_NORM, MUTANTS, REWRITTEN, ROUNDED, UNBIASED, Mutant

import fastvit
from fastvit import ops
from fastvit.regimes import OPS

NUMBERS = count()


# What the ops stand on.
MODULES = (
    *("backends.py", "call_facts.py", "derived.py", "errors.py", "extension.py", "measurements.py"),
    *("asking.py", "frames.py", "gpus.py", "recording.py", "weight_samples.py"),
    *("fc1_tiles.py", "native_backend.py", "triton_backend.py"),
)


def mutated_ops(mutant: Mutant, folder: Path) -> ModuleType:
    """fastvit.ops, imported anew from a copy of the source that has the fault in it.

    Raises:
        LookupError: the source does not hold exactly once what is to be replaced: the mutant has rotted.
    """
    # A name of its own: it is also the namespace that the copy registers its ops in, once in a process.
    home, package = Path(fastvit.__file__).parent, folder / f"fastvit_mutant_{next(NUMBERS)}"
    for part in ("ops", "reference"):
        shutil.copytree(home / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    for module in MODULES:
        shutil.copy(home / module, package)
    (package / "__init__.py").touch()
    path = package / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.file} holds {source.count(mutant.old)} times, not once: {mutant.old}")
    path.write_text(source.replace(mutant.old, mutant.new))

    spec = importlib.util.spec_from_file_location(package.name, package / "__init__.py")
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package.name}.ops")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]


@pytest.mark.parametrize("name", CHECKS)
def test_green_without_a_fault(name):
    CHECKS[name](ops)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.fault}")
def test_red_with_it(mutant, tmp_path):
    faulty = mutated_ops(mutant, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](faulty)


def test_a_copy_without_a_fault_is_green(tmp_path):
    mutant = MUTANTS[0]
    copy = mutated_ops(mutant._replace(new=mutant.old), tmp_path)
    assert copy.attention is not ops.attention
    for check in CHECKS.values():
        check(copy)


def test_a_right_rewrite_is_green(tmp_path):
    # In the form of two of the mutants, which might else have died of their form and not of their fault.
    rewrite = mutated_ops(Mutant("reference/normalization.py", "none", LAYER_NORM, REWRITTEN, ""), tmp_path)
    for mutant in MUTANTS:
        if mutant.new in (UNBIASED, ROUNDED):
            CHECKS[mutant.check](rewrite)


def test_a_mutant_that_has_rotted_is_an_error(tmp_path):
    with pytest.raises(LookupError, match="0 times, not once: what no file holds"):
        mutated_ops(MUTANTS[0]._replace(old="what no file holds"), tmp_path)


def test_every_op_has_mutants_and_every_check_kills():
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert {f"{part}/{op}.py" for part in ("ops", "reference") for op in OPS} <= {m.file for m in MUTANTS}
    assert len({mutant[:4] for mutant in MUTANTS}) == len(MUTANTS)
