"""Every call of tests/gpu is one that its op takes, with a launch on every architecture: shown without a GPU.

Launches are planned from shapes alone: here of tensors without data, and nothing is computed.
"""

import importlib.util
import sys
from contextlib import nullcontext
from functools import cache, partial
from inspect import signature
from itertools import product
from pathlib import Path
from unittest import mock

import kernel_launches
import op_cases
import pytest
import torch
from kernel_launches import attention_launch, embed_launch, on_device

from fastvit import ops, triton_backend, use_backend
from fastvit_kernels import attention, launch, patch_embed, tiles

FOLDER = Path(__file__).parent / "gpu"
sys.path.append(str(FOLDER))

import gpu_calls  # noqa: E402
import served  # noqa: E402

LAUNCHERS = {"attention": attention_launch, "patch_embed": embed_launch}
PARAM = type(pytest.param())


@cache
def load(name):
    spec = importlib.util.spec_from_file_location(f"cells_of_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=tiles.ARCHITECTURES)
def launches(request, monkeypatch):
    """The kernels that would have been launched on a GPU of this architecture."""
    planned = []

    def plan(self):
        launch.check_grid(self.grid)
        planned.append(self.kernel)

    for module in (attention, patch_embed):
        monkeypatch.setattr(module, "arch_of", lambda device: request.param)
    monkeypatch.setattr(launch.Launch, "__call__", plan)
    monkeypatch.setattr(triton_backend, "_machine", lambda tensor: None)
    monkeypatch.setattr(kernel_launches, "guarded", lambda tensor, **_: tensor)
    monkeypatch.setattr(kernel_launches, "red_zones", lambda: nullcontext(mock.Mock()))
    return planned


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_calls, "DEVICE", "cuda")
    monkeypatch.setattr(kernel_launches, "DEVICE", "meta")
    monkeypatch.setattr(op_cases, "build", build)
    monkeypatch.setattr(op_cases, "regime_call", regime_call)


def build(*args, make=op_cases.build, **options):
    with torch.device("meta"):
        return make(*args, **options)


@cache
def regime_call(*args, make=op_cases.regime_call, **sizes):
    return op_cases.converted(make(*args, **sizes), lambda tensor: tensor.to("meta"))


def cases(test):
    """The arguments that a test's marks give it, those of each case."""
    axes = []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args
            rows = [value.values if isinstance(value, PARAM) else value for value in values]
            if isinstance(names, str):
                names = (names,)
                rows = [
                    row if isinstance(value, PARAM) else (row,)
                    for row, value in zip(rows, values, strict=True)
                ]
            axes.append([dict(zip(names, row, strict=True)) for row in rows])
    return [{name: value for part in parts for name, value in part.items()} for parts in product(*axes)]


def run_cases(module, without=(), **fixtures):
    """Every case of every test of the module; what was raised, by the test's name."""
    found, count = {}, 0
    for name, test in vars(module).items():
        if not name.startswith("test_") or name in without:
            continue
        given = {
            fixture: value for fixture, value in fixtures.items() if fixture in signature(test).parameters
        }
        for case in cases(test):
            count += 1
            try:
                test(**case, **given)
            except Exception as error:
                found[f"{name}[{op_cases.name(case)}]"] = repr(error)
    assert count
    assert not found, "\n".join(f"{name}: {error}" for name, error in found.items())
    return count


def planned(op, kernels, call, grad=None, *, precision="ieee"):
    """In the place of the contract's checks."""
    assert served.refusal(op, call, backward=grad is not None) is None
    LAUNCHERS[op](kernels, on_device(call), grad, precision=precision)


@pytest.mark.parametrize("op", LAUNCHERS)
def test_parity(op, launches, monkeypatch):
    module = load(f"test_{op}_parity")
    check = "attention_within_contract" if op == "attention" else "embed_within_contract"
    monkeypatch.setattr(module, check, partial(planned, op))
    count = run_cases(module, gpu="meta")
    assert len(launches) > count


def test_smoke(launches, monkeypatch):
    module = load("test_smoke")
    monkeypatch.setattr(module, "attention_within_contract", partial(planned, "attention"))
    monkeypatch.setattr(module, "embed_within_contract", partial(planned, "patch_embed"))
    for case in (case for case in cases(module.test_it_is_right) if case["op"] in LAUNCHERS):
        op, mode, way = (case[name] for name in ("op", "mode", "way"))
        call = module.call_for(op, mode, case["form"])
        before = len(launches)
        module.judged(op, None, call, mode, way)
        with use_backend("triton"), torch.no_grad():
            getattr(ops, op)(**call)
        assert len(launches) > before + 1


# Of test_repeats_and_memory, and of test_streams_and_graphs.
@pytest.mark.parametrize("op", LAUNCHERS)
def test_calls_of_the_ops(op, launches):
    dtypes = (torch.bfloat16, torch.float32)
    for dtype, full, sizes in product(dtypes, (False, True), ({}, {"batch": 16})):
        gpu_calls.run(op, gpu_calls.call_of(op, dtype, full=full, **sizes))
    for batch, tokens in product((1, 32), (50, 197, 257, 577)):
        if op == "attention":
            call = {"qkv": torch.empty(batch, tokens, 3 * 4 * 64, dtype=dtypes[0], device="meta")}
            gpu_calls.run(op, call | {"num_heads": 4})
        else:
            images = torch.empty(batch, 3, 224, 224, dtype=dtypes[0], device="meta")
            gpu_calls.run(op, gpu_calls.call_of(op) | {"images": images})
    assert len(launches) >= 3 * 16


def test_large(launches):
    module = load("test_large")
    dtype = torch.bfloat16
    module.attention(*module.ATTENTION, "meta", dtype)
    assert len(launches) in (2, 3)  # the backward has one or two
    for images in ("uint8", "float"):
        module.patch_embed(module.IMAGES, images, "meta", dtype)
    assert len(launches) >= 2 + 2 * 4


@pytest.mark.parametrize("op", gpu_calls.NATIVE)
def test_what_the_library_takes(op):
    for full, dtype in product((False, True), (torch.bfloat16, torch.float16, torch.float32)):
        assert served.refusal(op, gpu_calls.call_of(op, dtype, full=full), backward=True) is None


def test_native_parity(monkeypatch):
    module = load("test_native_parity")
    monkeypatch.setattr(module, "judged", lambda op, call, mode, **_: _is_taken(op, call))
    assert run_cases(module) > 200


def test_fc1_parity(monkeypatch):
    module = load("test_fc1_parity")
    monkeypatch.setattr(module, "judged", lambda call, **_: _is_taken(module.OP, call))
    monkeypatch.setattr(module, "folds", lambda call, op=module.OP, **_: _is_taken(op, call))
    # What runs, in a graph and again and again, is of calls like these.
    without = (
        "test_it_is_what_runs",
        "test_in_a_graph",
        "test_the_same_bits_on_every_run_and_with_what_is_saved",
    )
    assert run_cases(module, without) > 150


def test_moments_parity(monkeypatch):
    module = load("test_moments_parity")
    monkeypatch.setattr(module, "judged", lambda call, op=module.RESIDUAL, **_: _is_taken(op, call))
    monkeypatch.setattr(module, "chained", lambda call, *_: _is_taken(module.RESIDUAL, call))
    without = ("test_the_same_bits_on_every_run", "test_it_is_what_runs", "test_in_a_graph")
    assert run_cases(module, without) > 80


def _is_taken(op, call):
    assert served.refusal(op, call, backward=True) is None
