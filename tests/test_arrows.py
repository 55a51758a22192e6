"""The import contracts of pyproject.toml: each is broken by the import that it is there to forbid."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "fastvit/__init__.py",
    "fastvit/errors.py",
    "fastvit/backends.py",
    "fastvit/ops/__init__.py",
    "fastvit/layers/__init__.py",
    "fastvit/layers/one.py",
    "fastvit/layers/two.py",
    "fastvit/vit.py",
    "fastvit/reference/__init__.py",
    "fastvit/reference/attention.py",
    "fastvit_kernels/__init__.py",
    "fastvit_kernels/attention.py",
    "fastvit_benchmarks/__init__.py",
]


def lint(folder, **sources):
    """What import-linter says of a house that is empty but for these modules ("__" stands for a slash)."""
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name in MODULES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, source in sources.items():
        (folder / f"{name.replace('__', '/')}.py").write_text(source)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_way_down_is_kept(tmp_path):
    code, text = lint(
        tmp_path,
        fastvit__vit="from .layers import one",
        fastvit__layers__one="from fastvit import ops",
        fastvit__ops__attention="from ..reference import attention\nfrom .. import backends",
        fastvit__ops__patch_embed="import fastvit_kernels.attention",
        fastvit__backends="from .errors import *",
        fastvit_kernels__attention="import triton, torch",
    )
    assert code == 0, text
    assert "0 broken" in text


@pytest.mark.parametrize(
    ("module", "source", "contract"),
    [
        ("fastvit__ops__attention", "import fastvit.layers", "Imports point one way"),
        ("fastvit__layers__one", "def later():\n    from ..vit import x", "Imports point one way"),
        ("fastvit__backends", "from . import ops", "Imports point one way"),
        ("fastvit__reference__attention", "from ..errors import x", "The reference is pure torch"),
        ("fastvit__reference__attention", "import fastvit_kernels", "The reference is pure torch"),
        ("fastvit__reference__attention", "import fastvit", "by its front door"),
        ("fastvit_kernels__attention", "from fastvit.errors import x", "Kernels import nothing of fastvit"),
        ("fastvit__backends", "import tests", "Nothing imports the tests"),
    ],
)
def test_each_contract_catches_its_fault(tmp_path, module, source, contract):
    code, text = lint(tmp_path, **{module: source})
    assert code == 1
    assert any(contract in line and line.endswith("BROKEN") for line in text.splitlines()), text


def test_a_circle_is_caught(tmp_path):
    code, text = lint(
        tmp_path, fastvit__layers__one="from . import two", fastvit__layers__two="from . import one"
    )
    assert code == 1
    assert "No circles BROKEN" in text
