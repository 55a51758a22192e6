"""What moments that are handed on gain is measured as the op asks for it, of two ways to one result."""

import pytest
import torch
from native_calls import needs_library

from fastvit import gpus, measurements, use_backend
from fastvit.ops import choices
from fastvit_benchmarks import handed_on
from fastvit_benchmarks.tables.gpu_questions import moments


def test_moments_are_asked_as_the_op_asks_it():
    found = list(moments())
    assert len({tuple(one.point.sizes.items()) + one.point.kind for one in found}) == len(found) == 24
    one = found[0].point
    with torch._subclasses.FakeTensorMode(), gpus.assume_arch("sm_90"):
        x = torch.empty(
            one.sizes["rows"] // 197, 197, one.sizes["width"], device="cuda", dtype=torch.bfloat16
        )
        with measurements.listening() as questions:
            choices.gives_moments("linear_residual", x, one.sizes["in"], torch.bfloat16)
    (question,) = questions
    assert (question.op, question.dtype, *question.directions, question.options) == one.kind
    assert question.sizes == one.sizes


@needs_library()
@pytest.mark.parametrize("on", [False, True])
def test_both_ways_to_the_next_norm_are_one_function(on, monkeypatch):
    """On the CPU's library, which has both."""
    monkeypatch.setattr(handed_on, "use_backend", lambda _: use_backend("cpp"))
    case = handed_on.HandedOn("fwd", "float32", 2, 27, 64)
    inputs = case.inputs(0, torch.device("cpu"))
    (found,) = handed_on.handing_on(on)(case, inputs)()
    del inputs["grad"]
    torch.testing.assert_close(found, case.reference(**inputs), rtol=1e-4, atol=1e-4)
