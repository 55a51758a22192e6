"""What installs, and what setup.py does on a machine that lacks something."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastvit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import libraries  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LIBRARIES = (f"_C{EXTENSION_SUFFIXES[0]}", "_fastvit_cpu.so", "_fastvit_cuda.so")
# As `pip install -e .` and `pip wheel .` have them.
INPLACE, EDITABLE, WHEEL = ("build_ext", "--inplace"), ("editable_wheel",), ("build",)
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def canonical(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_version_is_written_once():
    assert importlib.metadata.version("fastvit") == fastvit.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]


def test_torch_has_a_floor_and_no_ceiling():
    assert [name for name in PROJECT["project"]["dependencies"] if name.startswith("torch")] == [
        "torch>=2.11"
    ]
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert "OLD_TORCH := 2.11.0\n" in (ROOT / "Makefile").read_text()


def test_everything_asked_for_is_pinned():
    asked = {canonical(name) for name in sum(EXTRAS.values(), PROJECT["project"]["dependencies"])}
    assert asked - {"fastvit"} <= {canonical(name) for name in PINS}


def test_dev_holds_the_other_extras():
    named = set(re.match(r"fastvit\[(.*)\]", EXTRAS["dev"][0])[1].split(","))
    assert named == set(EXTRAS) - {"dev"}


def test_one_version_of_ruff():
    assert PROJECT["tool"]["ruff"]["required-version"] == f"=={PINS['ruff']}"
    assert f"ruff=={PINS['ruff']}" in EXTRAS["dev"]


def test_pins_leave_torchs_own_to_torch():
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-"))]


@pytest.fixture
def tree(tmp_path):
    """The least that setup.py needs."""
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "csrc", "LICENSE", "Makefile"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name in ("fastvit", "kernels"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / name / "__init__.py", tmp_path / name)
    (tmp_path / "kernels" / "tiles").mkdir()
    (tmp_path / "kernels" / "tiles" / "sm_80.json").write_text("{}")
    (tmp_path / "README.md").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def setup(tree, *arguments, **environment):
    """Runs setup.py as a pip install would; returns exit status and what it says of itself."""
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_no_compiler_is_a_line_a_part_and_no_failure(tree):
    bare = {"PATH": str(tree / "empty"), "CUDA_HOME": str(tree), "CXX": None}
    code, said = setup(tree, "build", FASTVIT_CUDA="0", PYTHONDONTWRITEBYTECODE=None, **bare)
    assert code == 0, said
    lines = said.splitlines(keepends=True)
    for name, line in zip(("_fastvit_cpu", "_C"), lines, strict=True):
        why = "no C++ compiler was found at install time (looked for c++"
        assert line.startswith(f"fastvit.{name} is not built: {why}")
        (note,) = tree.glob(f"build/lib*/fastvit/{name}.missing")
        assert note.read_text() == line
    assert list(tree.glob("build/lib*/fastvit_kernels/tiles/sm_80.json"))


def test_a_compile_error_is_a_line_a_part_and_no_failure(tree):
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("#error out of order\n#error and again\n")
    code, said = setup(tree, "build_ext", "--inplace", FASTVIT_CUDA="0")
    if "no C++ compiler" in said:
        pytest.skip("no C++ compiler")
    assert code == 0
    library, module = said.splitlines()
    assert re.fullmatch(r"fastvit\._fastvit_cpu is not built: .* at install time: .*out of order.*", library)
    assert re.fullmatch(r"fastvit\._C is not built: \S+ failed at install time: .*out of order.*", module)
    assert (tree / "fastvit" / "_C.missing").read_text() == module + "\n"


@pytest.fixture
def built(tree):
    """What setup.py builds, all of empty sources; it is given its command and returns the libraries."""
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("")
    (tree / "csrc" / "bindings.cpp").write_text('extern "C" void PyInit__C() {}')

    def build(*command):
        code, said = setup(tree, *command, FASTVIT_CUDA="0")
        assert code == 0, said
        if "no C++ compiler" in said:
            pytest.skip("no C++ compiler")
        folder = next(tree.glob("build/lib*/fastvit"), None) if command == WHEEL else tree / "fastvit"
        return [folder / name for name in LIBRARIES[:2]]

    return build


@pytest.mark.parametrize("command", [INPLACE, EDITABLE, WHEEL])
def test_a_failed_build_leaves_no_older_library_of_its_own(tree, built, command):
    module, library = built(*command)
    other = library.with_name("_fastvit_cuda.so")
    shutil.copy(library, other)
    assert setup(tree, *command, CXX="absent", FASTVIT_CUDA="0")[0] == 0
    for path in (module, library, other):
        assert not path.exists()
        assert path.with_name(f"{path.name.partition('.')[0]}.missing").is_file()


def test_what_was_built_here_is_known_by_its_content(tree, built):
    module, library = built(*INPLACE)
    library.write_bytes(b"another")
    setup(tree, *INPLACE, CXX="absent", FASTVIT_CUDA="0")
    assert library.read_bytes() == b"another"
    assert not module.exists()


@pytest.mark.parametrize("command", [INPLACE, EDITABLE])
def test_a_library_from_elsewhere_stays_and_a_line_says_so(tree, command):
    for name in LIBRARIES:
        (tree / "fastvit" / name).write_text(name)
        (tree / "fastvit" / f"{name.partition('.')[0]}.missing").touch()
    code, said = setup(tree, *command, CXX="absent", FASTVIT_CUDA="0")
    assert code == 0
    assert {path.name for path in (tree / "fastvit").iterdir()} == {"__init__.py", *LIBRARIES}
    assert all((tree / "fastvit" / name).read_text() == name for name in LIBRARIES)
    stays = "fastvit.{} is not rebuilt: {}; {} was not built here, and stays"
    why = "no C++ compiler was found at install time (looked for absent)"
    assert {line for line in said.splitlines() if line.startswith("fastvit.")} == {
        stays.format("_fastvit_cpu", why, LIBRARIES[1]),
        stays.format("_fastvit_cuda", "FASTVIT_CUDA is 0", LIBRARIES[2]),
        stays.format("_C", why, LIBRARIES[0]),
    }


def test_a_build_takes_the_place_of_a_library_from_elsewhere(tree, built):
    (tree / "fastvit" / LIBRARIES[1]).write_text("another")
    _, library = built(*INPLACE)
    assert library.read_bytes().startswith(b"\x7fELF")


def test_build_information_is_of_the_cuda_library_that_stays(tree):
    text = libraries.BUILT_FOR.format("80 90a", "4.2.0")
    (tree / "fastvit" / "_fastvit_cuda.so").write_bytes(b"\0" + text.encode() + b"\0")
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text('static_assert(false, "for " FASTVIT_CUDA_ARCHS ", " FASTVIT_CUTLASS);')
    _, said = setup(tree, *INPLACE, FASTVIT_CUDA="0")
    if "no C++ compiler" in said:
        pytest.skip("no C++ compiler")
    assert "for 80 90a, 4.2.0" in said


def test_without_torch_the_libraries_say_so(tree):
    """As in an isolated build: torch is a folder of headers to them, and there is none."""
    (tree / "csrc" / "bindings.cpp").write_text("#error none\n")
    (tree / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    code, said = setup(tree, "build_ext", "--inplace", FASTVIT_CUDA="0", PYTHONPATH=str(tree))
    assert code == 0
    why = "torch was not found at install time (install it first, then use --no-build-isolation)"
    assert said.splitlines()[0].startswith(f"fastvit._fastvit_cpu is not built: {why}")


def test_cuda_that_was_asked_for_and_cannot_be_built_fails_hard(tree):
    fake = tree / "empty" / "nvcc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for source in (tree / "csrc").glob("*.c*"):
        source.write_text("#error out of order\n")
    path = f"{tree / 'empty'}{os.pathsep}{os.environ['PATH']}"
    carried = tree / "fastvit" / "_fastvit_cuda.so"
    carried.touch()
    code, said = setup(tree, *INPLACE, FASTVIT_CUDA="1", PATH=path)
    assert code == 1
    assert carried.is_file()
    assert said.splitlines()[-1].startswith("FASTVIT_CUDA=1, but fastvit._fastvit_cuda cannot be built: ")


def test_an_unknown_architecture_is_one_line(tree):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    for source in (tree / "csrc").glob("*.c*"):
        source.write_text("#error out of order\n")
    code, said = setup(tree, "build_ext", "--inplace", FASTVIT_CUDA="1", FASTVIT_CUDA_ARCHS="80 75")
    assert code == 1
    assert "FASTVIT_CUDA_ARCHS has '75'; it may have 80, 89, 90a, 100, 120" in said.splitlines()[-1]


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " 1"])
def test_a_bad_cuda_choice_is_one_line(tree, value):
    assert setup(tree, "egg_info", FASTVIT_CUDA=value) == (
        1,
        f"FASTVIT_CUDA must be auto, 0 or 1, not {value!r}\n",
    )


def test_cuda_without_nvcc_fails_hard_and_only_when_asked_for(tree):
    bare = {"PATH": str(tree / "empty"), "CUDA_HOME": str(tree)}
    code, said = setup(tree, "egg_info", FASTVIT_CUDA="1", **bare)
    assert code == 1
    assert said == "FASTVIT_CUDA=1 needs nvcc, which was found neither on PATH nor in CUDA_HOME/bin\n"
    for choice in ("0", "auto", ""):
        assert setup(tree, "egg_info", FASTVIT_CUDA=choice, **bare) == (0, "")


def test_metadata_needs_neither_torch_nor_pybind11(tree):
    for name in ("torch", "pybind11"):
        (tree / "empty" / f"{name}.py").write_text("raise AssertionError('imported')")
    assert setup(tree, "egg_info", PYTHONPATH=str(tree / "empty")) == (0, "")
    assert f"Version: {fastvit.__version__}" in (tree / "fastvit.egg-info" / "PKG-INFO").read_text()


def make(tree, *arguments, **environment):
    if not (tool := shutil.which("make")):
        pytest.skip("no make")
    # This suite is itself run by make, which tells the makes below it how deep they are.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in outer} | environment
    done = subprocess.run(
        [tool, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_make_without_a_new_enough_python_is_one_line(tree):
    (tree / "empty" / "sh").symlink_to(shutil.which("sh"))
    code, said = make(tree, PATH=str(tree / "empty"), PYTHON="python2.7")
    assert code == 2
    assert re.fullmatch(r"Makefile:\d+: \*\*\* fastvit needs Python 3\.11 or newer: .*\n", said)


def test_a_second_make_does_nothing(tree):
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").touch()
    (tree / ".venv" / ".stamp").touch()
    assert make(tree) == (0, "make: Nothing to be done for 'setup'.\n")
    os.utime(tree / "csrc" / "bindings.cpp", (2**33, 2**33))
    assert "pip" in make(tree, "--dry-run")[1]
