"""Each grep finds its fault, and leaves the right form alone."""

import ast
from pathlib import Path

import greps
import pytest

CASES = [
    ("kernels/op.py", "p = tl.make_block_ptr(x, s, t, o, b, r)", "make_block_ptr"),
    ("kernels/op.py", "from triton.language import make_block_ptr", "make_block_ptr"),
    ("tests/test_op.py", "torch.testing.assert_close(a, b, equal_nan=True)", "equal_nan"),
    ("fastvit/op.py", "try:\n    f()\nexcept:\n    pass", "bare except"),
    ("fastvit/op.py", "import pickle", "pickle"),
    ("fastvit/op.py", "from pickle import loads", "pickle"),
    ("benchmarks/op.py", "import os, joblib.memory", "pickle"),
    ("fastvit/op.py", "torch.load(path)", "weights_only"),
    ("fastvit/op.py", "torch.load(path, weights_only=False)", "weights_only"),
    ("fastvit/op.py", "np.load(path, allow_pickle=True)", "allow_pickle"),
    ("setup.py", "if torch.cuda.is_available(): pass", "is_available"),
    ("kernels/op.py", "acc = tl.dot(\n    q,\n    k,\n    acc,\n)", "input_precision"),
    ("kernels/op.py", "x = tl.load(\n    x_ptr,\n    mask=m,\n)", "other"),
    ("kernels/op.py", "x = tl.load(x_ptr, m)", "other"),
]
RIGHT = [
    ("kernels/op.py", "acc = tl.dot(q, k, acc, input_precision=PRECISION)"),
    (
        "kernels/op.py",
        "x = tl.load(x_ptr)\ny = tl.load(x_ptr, m, 0.0)\nz = tl.load(x_ptr, mask=m, other=0.0)",
    ),
    ("kernels/op.py", "# tl.dot(a, b), make_block_ptr and except: in a comment"),
    ("tests/test_op.py", "import pickle\ntorch.load(path)\nassert_close(a, b, equal_nan=False)"),
    ("fastvit/op.py", "torch.load(path, weights_only=True)\ntorch.cuda.is_available()"),
    ("fastvit/op.py", "try:\n    f()\nexcept ValueError:\n    pass"),
]


@pytest.mark.parametrize(("path", "source", "word"), CASES)
def test_fault_is_found(path, source, word):
    ((_, text),) = greps.faults(ast.parse(source), Path(path))
    assert word in text


@pytest.mark.parametrize(("path", "source"), RIGHT)
def test_right_form_is_left_alone(path, source):
    assert list(greps.faults(ast.parse(source), Path(path))) == []


def test_a_fault_is_printed_with_its_place_and_fails(tmp_path, capsys):
    (tmp_path / "op.py").write_text("\nimport pickle\n")
    assert greps.main([str(tmp_path / "op.py")]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'op.py'}:2: pickle")
