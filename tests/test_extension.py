"""fastvit._C: what it says when it loads, and the one line when it does not."""

import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

import fastvit
from fastvit import extension
from fastvit.errors import ExtensionMismatch, ExtensionNotBuilt

LIBRARY = f"_C{EXTENSION_SUFFIXES[0]}"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation with no compiled part, for the test to put one in."""
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    return tmp_path


def compiled(source, folder):
    """A module in plain C, so that a test costs a tenth of a second."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    (folder / "module.c").write_text(source)
    include = sysconfig.get_path("include")
    command = [COMPILER, "-shared", "-fPIC", f"-I{include}", "module.c", "-o", LIBRARY]
    subprocess.run(command, cwd=folder, check=True)


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_build_info_of_this_installation():
    if not any((extension.FOLDER / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        pytest.skip("fastvit._C is not built here")
    info = extension.build_info()
    assert info.version == fastvit.__version__
    assert info.cxx_standard == 201703
    assert info.cuda in ("auto", "0", "1")
    assert set(info.cuda_archs) <= {"80", "89", "90a", "100", "120"}
    assert str(info).startswith(
        f"fastvit {info.version}, {info.compiler}, C++17, built beside torch {info.torch}"
    )


def test_it_is_loaded_once():
    if not any((extension.FOLDER / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        pytest.skip("fastvit._C is not built here")
    assert extension._load(extension.FOLDER) is extension._load(extension.FOLDER)


def test_absent(folder):
    with pytest.raises(ExtensionNotBuilt, match="was not installed") as raised:
        extension.build_info()
    assert one_line(raised)


def test_absent_with_the_installers_reason(folder):
    (folder / "_C.missing").write_text(
        "fastvit._C is not built: no C++ compiler was found at install time; ...\n"
    )
    with pytest.raises(ExtensionNotBuilt) as raised:
        extension.build_info()
    assert one_line(raised) == "fastvit._C is not built: no C++ compiler was found at install time; ..."


def test_built_for_another_python(folder):
    (folder / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    with pytest.raises(ExtensionMismatch) as raised:
        extension.build_info()
    assert "built for _C.cpython-39-x86_64-linux-gnu.so, found " + sys.implementation.cache_tag in one_line(
        raised
    )


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + b"\0" * 60])
def test_broken_file_gives_the_loaders_text(folder, content):
    (folder / LIBRARY).write_bytes(content)
    with pytest.raises(ExtensionMismatch, match=r"does not load here: .*_C\.") as raised:
        extension.build_info()
    assert one_line(raised)


def test_undefined_symbol_gives_the_loaders_text(folder):
    compiled("void *elsewhere(void); void *PyInit__C(void) { return elsewhere(); }", folder)
    with pytest.raises(ExtensionMismatch, match="undefined symbol: elsewhere"):
        extension.build_info()


def test_another_modules_library_gives_the_loaders_text(folder):
    compiled("int unrelated;", folder)
    with pytest.raises(ExtensionMismatch, match="PyInit__C"):
        extension.build_info()


def test_built_for_another_fastvit(monkeypatch):
    class Old:
        @staticmethod
        def build_info():
            return dict.fromkeys(extension.BuildInfo.__dataclass_fields__) | {"version": "0.0.9"}

    monkeypatch.setattr(extension, "_load", lambda folder: Old)
    with pytest.raises(ExtensionMismatch, match=rf"built for fastvit 0\.0\.9, found {fastvit.__version__}"):
        extension.build_info()
