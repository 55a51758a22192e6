"""What the compiled CPU ops keep for backward: nothing but what the mathematics needs."""

import op_cases
import pytest
import torch
from native_calls import OPS, leaves, needs_library
from op_checks import GRADS
from test_native_graphs import CELLS, FULL, build
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastvit import ops, use_backend

pytestmark = needs_library()
LINEAR, RESIDUAL, MLP = OPS
# No bias is read again.
READ_AGAIN = {
    LINEAR: {"x", "norm_weight", "norm_bias", "weight"},
    RESIDUAL: {"x", "weight", "layer_scale", "sample_scale"},
    MLP: {
        *("x", "norm_weight", "norm_bias", "fc1_weight", "fc2_weight", "gate_weight"),
        *("inner_norm_weight", "inner_norm_bias", "layer_scale", "sample_scale"),
    },
}


@pytest.fixture(autouse=True)
def _cpp():
    with use_backend("cpp"):
        yield


def _place(tensor):
    return tensor.untyped_storage().data_ptr()


# By storage: what is saved twice is there once, and a view holds all of what it is of.
@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_its_inputs_the_statistics_and_what_enters_the_activation(op, cell, dtype):
    call, kept = leaves(build(op, dtype, **cell)), {}
    with saved_tensors_hooks(lambda t: kept.setdefault(_place(t), t), lambda t: t):
        out = getattr(ops, op)(**call)
    given = op_cases.tensors(call)
    assert {name for name, t in given.items() if _place(t) in kept} == READ_AGAIN[op] & given.keys()
    assert _place(out) not in kept
    own = sum(
        kept[place].untyped_storage().nbytes() for place in kept.keys() - set(map(_place, given.values()))
    )
    rows = call["x"].shape[0] * call["x"].shape[1]
    norms = 0 if op == RESIDUAL else 1 + ("inner_norm_weight" in given)
    statistics = norms * rows * 4 * (1 if call.get("norm") == "rms_norm" else 2)
    before = [rows * len(given[name]) for name in ("fc1_weight", "gate_weight") if name in given]
    # LayerScale's gradient needs the product that it scales.
    before += [rows * len(given["layer_scale"])] if call.get("layer_scale") is not None else []
    assert own == statistics + sum(before) * dtype.itemsize


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_saved_where_nothing_needs_a_gradient(op):
    call, kept = build(op, **FULL[op]), []
    with saved_tensors_hooks(kept.append, lambda t: t):
        getattr(ops, op)(**call)
        with torch.no_grad():
            getattr(ops, op)(**leaves(call))
    assert kept == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(op, reentrant):
    def run(function):
        call = leaves(build(op, **FULL[op]))
        out = function(call)
        out.backward(GRADS["contiguous"](out))
        return {name: leaf.grad for name, leaf in op_cases.tensors(call).items()}

    def checkpointed(call):
        return checkpoint(lambda x: getattr(ops, op)(**call | {"x": x}), call["x"], use_reentrant=reentrant)

    found, expected = run(checkpointed), run(lambda call: getattr(ops, op)(**call))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# As offloading saved tensors does, which gives each back as another tensor.
@pytest.mark.parametrize("op", OPS)
def test_saved_tensors_may_come_back_as_copies(op):
    call = leaves(build(op, **FULL[op]))
    names = [name for name, tensor in op_cases.tensors(call).items() if tensor.requires_grad]
    found = []
    for unpack in (torch.Tensor.clone, lambda t: t):
        with saved_tensors_hooks(lambda t: t.detach(), unpack):
            out = getattr(ops, op)(**call)
        found.append(torch.autograd.grad(out, [call[name] for name in names], GRADS["transposed"](out)))
    torch.testing.assert_close(*found, rtol=0, atol=0)
