"""FASTVIT_BACKEND and FASTVIT_DISABLE, in fresh processes."""

import os
import subprocess
import sys

from fastvit.regimes import OPS


def python(code, **environment):
    """What a fresh process prints, its environment free of our variables but for those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTVIT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_environment_names_backends():
    code = """
from fastvit import backends
from fastvit.backends import requested, use_backend
print(requested("attention"), requested("patch_embed"), requested("linear_residual"), sep=" ")
with use_backend("auto"):
    print(requested("attention"))
for text in ("tritom", "attention=fast", "softmax=triton", "attention=cuda", "=triton", " , "):
    try:
        print(backends.parse(text))
    except ValueError as error:
        print(error)
"""
    printed = python(code, FASTVIT_BACKEND=" attention = reference, triton ,")
    assert printed == [
        "reference triton auto",
        "auto",
        "unknown backend 'tritom'; the backends are auto, triton, reference, cuda, cpp",
        "unknown backend 'fast'; the backends are auto, triton, reference, cuda, cpp",
        f"unknown op 'softmax'; the ops are {', '.join(OPS)}",
        "attention has no backend 'cuda'; it has triton, cpp, reference",
        f"unknown op ''; the ops are {', '.join(OPS)}",
        "{}",
    ]


def test_a_bad_environment_is_one_line_at_the_first_op():
    code = """
import fastvit
from fastvit.backends import resolve
try:
    resolve("attention")
except ValueError as error:
    print(error)
"""
    assert python(code, FASTVIT_BACKEND="attention=fast") == [
        "FASTVIT_BACKEND: unknown backend 'fast'; the backends are auto, triton, reference, cuda, cpp"
    ]


def test_disabled_by_the_environment():
    code = """
from fastvit import BackendUnavailable
from fastvit.backends import TABLE, Backend, describe, resolve, use_backend
TABLE["attention"] = (Backend("triton", lambda *args: None), *TABLE["attention"][1:])
print([(op, chosen) for op, chosen, why in describe() if why != "FASTVIT_DISABLE is set"])
print({resolve(op) for op in TABLE})
with use_backend("reference"):
    print(resolve("attention"))
try:
    with use_backend("triton"):
        resolve("attention")
except BackendUnavailable as error:
    print(error)
"""
    assert python(code, FASTVIT_DISABLE="1") == [
        "[]",
        "{'reference'}",
        "reference",
        "attention: backend 'triton' was asked for, but FASTVIT_DISABLE is set",
    ]
