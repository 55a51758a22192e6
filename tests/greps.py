"""Faults that no linter knows and a glance finds: `python tests/greps.py [file ...]` prints each and exits 1.

It reads syntax trees rather than text, so a call over several lines counts and a comment does not.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("fastvit", "kernels", "benchmarks", "tests")
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def faults(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for each fault in one file. Tests may pickle: they make the hostile files."""
    is_test, is_setup = "tests" in path.parts, path.name == "setup.py"
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield node.lineno, "bare except: name the exception"
            case ast.Import(names=names) if not is_test and PICKLES & {_root(name.name) for name in names}:
                yield node.lineno, "pickle executes what it reads: use safetensors or json"
            case ast.ImportFrom(module=str(module)) if not is_test and _root(module) in PICKLES:
                yield node.lineno, "pickle executes what it reads: use safetensors or json"
            case ast.Attribute(attr="is_available") if is_setup:
                yield node.lineno, "is_available in setup.py: a machine that builds need not have a GPU"
            case ast.Attribute(attr="make_block_ptr") | ast.alias(name="make_block_ptr"):
                yield node.lineno, "make_block_ptr is deprecated and 32-bit: compute the pointers"
            case ast.Call():
                yield from ((node.lineno, text) for text in _call_faults(node, is_test))


def _call_faults(call: ast.Call, is_test: bool) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if _is_true(keywords.get("equal_nan")):
        yield "equal_nan=True: a test where NaN equals NaN cannot fail"
    if name.endswith("torch.load") and not is_test and not _is_true(keywords.get("weights_only")):
        yield "torch.load unpickles: pass weights_only=True"
    if _is_true(keywords.get("allow_pickle")) and not is_test:
        yield "allow_pickle executes what it reads"
    if name in ("tl.dot", "triton.language.dot") and "input_precision" not in keywords:
        yield "tl.dot without input_precision: its default is tf32"
    if name in ("tl.load", "triton.language.load"):
        masked, filled = "mask" in keywords or len(call.args) > 1, "other" in keywords or len(call.args) > 2
        if masked and not filled:
            yield "masked tl.load without other: the masked lanes hold anything"


def _root(module: str) -> str:
    return module.partition(".")[0]


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    paths = [Path(name) for name in arguments] or [
        Path("setup.py"),
        *(path.relative_to(root) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))),
    ]
    count = 0
    for path in paths:
        for line, text in faults(ast.parse((root / path).read_bytes()), path):
            print(f"{path}:{line}: {text}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
