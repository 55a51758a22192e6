"""Copies of frozen weights on a GPU follow what torch does not record, a call later and without a wait."""

from functools import partial

import pytest
import torch
from gpu_calls import NATIVE, call_of

from fastvit import derived, ops, use_backend

pytestmark = pytest.mark.needs(library=True, runtime=True)
WEIGHTS = dict(zip(NATIVE, ("weight", "weight", "fc1_weight"), strict=True))


@pytest.fixture(autouse=True)
def _nothing_kept():
    derived.refresh()
    yield
    derived.refresh()


@pytest.mark.parametrize("op", NATIVE)
def test_a_write_past_torch_is_seen_a_call_later(op, gpu):
    """Weights in float32 under autocast, of which a copy in bfloat16 is kept."""
    call, run = call_of(op, torch.float32), partial(getattr(ops, op), frozen=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), use_backend("cuda"):
        before = run(**call)
        assert derived.everything()
        assert torch.equal(run(**call), before)
        call[WEIGHTS[op]].data.mul_(2)
        run(**call)
        torch.cuda.synchronize()
        after = run(**call)
        derived.refresh()
        assert torch.equal(after, run(**call))
        assert not torch.equal(after, before)


def test_nothing_waits(gpu):
    call = call_of("linear_residual", torch.float32)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), use_backend("cuda"):
        ops.linear_residual(**call, frozen=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.linear_residual(**call, frozen=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
