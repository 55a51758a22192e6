"""The compiled CPU ops under autocast: torch's own table of dtypes, and its own ops in float16."""

import op_cases
import plain_ops
import pytest
import torch
from native_calls import OPS, leaves, needs_library

from fastvit import BackendUnavailable, ops, use_backend
from fastvit.backends import resolve
from fastvit.contract import judge

pytestmark = needs_library()
CELLS = [(op, cell) for op in OPS for cell in op_cases.cells(op)]
LARGE = {"batch": 3, "tokens": 15}


@pytest.fixture(autouse=True)
def _cpp():
    with use_backend("cpp"):
        yield


# Everything in float32, and with what an autocast layer before it left in low precision.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
@pytest.mark.parametrize("low", [False, True], ids=["float32 in", "low in"])
@pytest.mark.parametrize("training", [False, True])
def test_autocasts_as_torchs_own_ops_do(op, cell, low, training):
    call = op_cases.build(op, dtype=torch.float32, **cell, **LARGE)
    if low:
        call["x"] = call["x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        call = leaves(call) if training else call
        expected = getattr(plain_ops, op)(**call)
        try:
            found = getattr(ops, op)(**call)
        except BackendUnavailable as error:
            assert expected.dtype == torch.float32
            assert "under autocast the result is float32, and it writes bfloat16" in str(error)
            return
    assert found.dtype == expected.dtype
    check = judge(op, found, getattr(plain_ops, op)(**op_cases.float64(call)), expected, kind="gemm")
    assert check.ok, check


def test_float16_is_torchs_own():
    x, weight = torch.randn(1, 3, 4), torch.randn(4, 4)
    reason = "cannot run: it takes float32, bfloat16, float64, not float16"
    with torch.autocast("cpu", torch.float16), pytest.raises(BackendUnavailable, match=reason):
        ops.layer_norm_linear(x, None, None, weight)
    with torch.autocast("cpu", torch.float16), use_backend("auto"):
        assert resolve("layer_norm_linear", x, None, None, weight) == "reference"
        assert ops.layer_norm_linear(x, None, None, weight).dtype == torch.float16
