"""Kernels that begin while those before them end (FASTVIT_PDL=1) wait before they touch memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvit_kernels import aot, attention
from fastvit_kernels.launch import begins_early

CSRC = Path(__file__).parents[1] / "csrc"
TOUCHES = re.compile(r"\b(?:ld|st|red|atom|prefetch)\.global|\bcp\.async|cp\.reduce")
WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
PLAN = "fastvit_kernels.attention_aot"
# In a process of its own: here kernels are interpreted.
COMPILES = """
import json
from fastvit_kernels import aot
from fastvit_kernels.aot_compile import compile_launch
for label, launch in aot.launches("{plan}", "sm_90"):
    if label.startswith({labels}):
        compiled, _ = compile_launch(launch, 90)
        print(json.dumps([compiled.metadata.launch_pdl, compiled.asm["ptx"]]))
"""


def compiled(asked, *labels):
    environment = os.environ | {"TRITON_INTERPRET": "0", "FASTVIT_PDL": asked}
    command = [sys.executable, "-c", COMPILES.format(plan=PLAN, labels=labels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def _planned_anew():
    aot.launches.cache_clear()
    yield
    aot.launches.cache_clear()


@pytest.mark.usefixtures("_planned_anew")
@pytest.mark.parametrize(
    ("arch", "asked", "early"),
    [
        ("sm_90", "1", True),
        ("sm_100", "1", True),
        ("sm_120", "1", True),
        ("sm_80", "1", False),
        ("sm_89", "1", False),
        ("safe", "1", False),
        ("sm_90", "0", False),
        ("sm_90", "", False),
    ],
)
def test_it_is_asked_for_and_from_hopper_on(monkeypatch, arch, asked, early):
    monkeypatch.setenv("FASTVIT_PDL", asked)
    assert begins_early(arch) is early
    launches = [launch for _, launch in aot.launches(PLAN, arch)]
    assert {launch.options["launch_pdl"] for launch in launches} == {early}


def test_every_kernel_waits_before_it_touches_memory():
    """Forward, backward in one launch, and in two."""
    kernels = compiled("1", "half N=50 d=64", "half N=257 d=80,", "half N=257 d=64")
    assert len(kernels) == 6
    for early, ptx in kernels:
        assert early
        assert ptx.count(WAIT) == ptx.count(RELEASE) == 1
        assert ptx.index(WAIT) < ptx.index(RELEASE) < TOUCHES.search(ptx).start()


def test_without_it_nothing_waits():
    ((early, ptx),) = compiled("0", "half N=577 d=72", "no other")
    assert not early
    assert "griddepcontrol" not in ptx
    assert TOUCHES.search(ptx)


def test_the_kernels_in_cuda_do_too():
    """But for what copies of weights are compared by, which is launched plainly."""
    paths = {*CSRC.glob("*.cu"), *CSRC.glob("*.cuh")} - {CSRC / "weight_samples_cuda.cu"}
    text = "".join(path.read_text() for path in paths)
    first = re.findall(r"__global__[^{;]*\{\n *(.*)", text)
    assert len(first) == text.count("__global__") >= 10
    assert set(first) == {"await_the_stream();"}
    assert "<<<" not in text


def test_products_on_hopper_do_unless_stream_k_splits_them():
    """By the text alone: csrc/cuda_report.py finds the wait in what a compiler of CUDA makes of it."""
    header = (CSRC / "fc1_gemm_sm90.cuh").read_text()
    assert header.index("#define CUTLASS_ENABLE_GDC_FOR_SM90\n") < header.index("#include <cutlass/")
    paths = {*CSRC.glob("*_sm90.cu"), *CSRC.glob("*_sm90.cuh")} - {CSRC / "fc1_gemm_sm90.cuh"}
    others = "".join(path.read_text() for path in paths)
    # Whatever else is read of CUTLASS first does not know of waiting.
    assert set(re.findall("#include <(cutlass.*)>", others)) == {"cutlass/arch/reg_reconfig.h"}
    assert others.count('#include "fc1_gemm_sm90.cuh"') == 4
    assert re.findall(r"\bdevice\.run\(.*", header) == ["device.run(place.stream, nullptr, early);"]
    assert "early = place.begins_early && !Types::kStreamK;" in header
    assert ".run(place.stream" not in others
    assert "begins_early(beside)};" in (CSRC / "fused_products.cpp").read_text()


def test_the_interpreter_has_no_such_kernels(monkeypatch):
    monkeypatch.setenv("FASTVIT_PDL", "1")
    q = torch.randn(1, 17, 2, 32)
    out, _ = attention.attention_fwd(q, q, q, scale=1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, scale=1.0)
    torch.testing.assert_close(out.view_as(q), expected.transpose(1, 2), rtol=1e-4, atol=1e-4)
