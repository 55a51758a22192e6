"""The compiled CPU ops as torch sees them: registered, traced, compiled and exported."""

import op_cases
import pytest
import torch
from native_calls import OPS, leaves, needs_library, trained
from test_op_compile import Layer, compiled_for_any_batch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import BackendUnavailable, ops, use_backend

pytestmark = needs_library()
LINEAR, RESIDUAL, MLP = OPS
FULL = op_cases.FULL
CELLS = [
    (LINEAR, {}),
    (LINEAR, {"norm": "rms_norm", "affine": "weight", "bias": False}),
    (LINEAR, {"affine": None}),
    (RESIDUAL, {}),
    (RESIDUAL, {"bias": False, "layer_scale": False, "sample_scale": False}),
    (MLP, {"layer_scale": False, "sample_scale": False}),
    (MLP, {"activation": "swiglu", "norm": "rms_norm", "affine": "weight", "biases": False}),
    (MLP, FULL[MLP]),
]


@pytest.fixture(autouse=True)
def _cpp():
    torch.compiler.reset()
    with use_backend("cpp"):
        yield


def build(op, dtype=torch.float32, **options):
    return op_cases.build(op, dtype=dtype, tokens=11, **options)


def registered(op, call):
    """The arguments of the op's two entries in the dispatcher, as the public op gives them."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastvit":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        with torch.no_grad():
            getattr(ops, op)(**call)
        out = getattr(ops, op)(**leaves(call))
        out.backward(torch.ones_like(out))
    return seen


def _detached(value):
    if isinstance(value, (list, tuple)):
        return [_detached(one) for one in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


# Once as it runs without gradients, once as it runs with them, once its gradients. Dropped: bfloat16, which
# takes the same way.
@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_a_well_behaved_torch_op(op, cell, dtype):
    """Its schema is true, its fake kernel right, its gradients registered, and AOTAutograd traces it."""
    entries = registered(op, build(op, dtype, **cell))
    assert [func._schema.name for func, _ in entries] == [f"fastvit::{op}_{d}" for d in ("fwd", "fwd", "bwd")]
    for func, args in entries:
        torch.library.opcheck(func, _detached(args))
    func, args = entries[0]
    given = _detached(args)
    for tensor in [t for t in given if isinstance(t, torch.Tensor) and t.dim() != 1]:
        tensor.requires_grad_()
    torch.library.opcheck(func, given)


# As `accelerate` calls them by default: a factor of its own. Folded, which mode="inference" allows, it is
# rounded otherwise where no gradient is recorded.
@pytest.mark.parametrize("op", [RESIDUAL, MLP])
def test_layer_scale_in_bfloat16_is_well_behaved_with_gradients_and_without(op):
    call = build(op, torch.bfloat16, **FULL[op]) | {"frozen": False}
    assert call["layer_scale"] is not None
    for func, args in registered(op, call):
        torch.library.opcheck(func, _detached(args))
        if func._schema.name.endswith("fwd"):
            needed = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in _detached(args)]
            torch.library.opcheck(func, needed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_once_for_every_batch(op, training):
    function = getattr(ops, op)
    compiled_once = compiled_for_any_batch(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            call = build(op, batch=batch, **FULL[op])
            if training:
                found, expected = (trained(op, call, "sum", f) for f in (compiled_once, function))
            else:
                with torch.no_grad():
                    found, expected = compiled_once(**call), function(**call)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_exports_as_one_op(op):
    def call(batch):
        return build(op, batch=batch, **FULL[op]) | dict.fromkeys({"sample_scale"} & call_names)

    call_names = build(op, **FULL[op]).keys()
    layer, fixed = Layer(op, call(2)), op == RESIDUAL  # whose residual is the layer's own here
    batch = None if fixed else {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (call(2)["x"],), dynamic_shapes={"main": batch})
    names = [str(node.target) for node in program.graph.nodes if "fastvit" in str(node.target)]
    assert names == [f"fastvit.{op}_fwd.default"]
    for size in (2,) if fixed else (2, 5):
        torch.testing.assert_close(program.module()(call(size)["x"]), layer(call(size)["x"]))


@pytest.mark.parametrize("op", OPS)
def test_traces_symbolically(op):
    call = build(op, **FULL[op])
    layer = Layer(op, call)
    leaf = torch.fx.symbolic_trace(layer)
    assert [node.target for node in leaf.graph.nodes if node.op == "call_function"] == [getattr(ops, op)]
    torch.testing.assert_close(leaf(call["x"]), layer(call["x"]))

    tensors = op_cases.tensors(call)
    traced = make_fx(lambda given: getattr(ops, op)(**call | given), tracing_mode="symbolic")(tensors)
    assert f"fastvit.{op}_fwd.default" in [str(node.target) for node in traced.graph.nodes]
    torch.testing.assert_close(traced(tensors), getattr(ops, op)(**call))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [False, True])
def test_answers_for_fake_tensors(op, training):
    call = build(op, torch.bfloat16, **FULL[op])
    real = getattr(ops, op)(**call)
    with FakeTensorMode() as mode:
        fake = op_cases.converted(call, mode.from_tensor)
        out = getattr(ops, op)(**leaves(fake) if training else fake)
        facts = (out.shape, out.dtype, out.stride(), out.device, out.requires_grad)
        assert facts == (real.shape, real.dtype, real.stride(), real.device, training)
        if training:
            for name, gradient in trained(op, fake).items():
                assert (gradient.shape, gradient.dtype) == (call[name].shape, call[name].dtype)


# vmap's batch is no dimension of the op's, and forward-mode derivatives have no rule.
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_are_refused_with_the_reason(op):
    call = build(op)

    def function(x):
        return getattr(ops, op)(**call | {"x": x})

    reason = "cannot run: it has no rules for torch.func's transforms"
    for transform in (torch.func.grad(lambda x: function(x).sum()), torch.func.jacrev(function)):
        with pytest.raises(BackendUnavailable, match=reason):
            transform(call["x"])
    with pytest.raises(BackendUnavailable, match=reason):
        torch.func.vmap(function)(call["x"].expand(3, *call["x"].shape))
    with pytest.raises(BackendUnavailable, match=reason):
        torch.func.jvp(function, (call["x"],), (call["x"],))
    with use_backend("auto"):
        assert torch.func.vmap(function)(call["x"].expand(3, *call["x"].shape)).shape[0] == 3


@pytest.mark.parametrize("op", OPS)
def test_takes_tensors_made_in_inference_mode(op):
    call = build(op, **FULL[op])
    with torch.inference_mode():
        made = op_cases.converted(call, torch.Tensor.clone)
        found = getattr(ops, op)(**made)
    assert found.is_inference()
    torch.testing.assert_close(getattr(ops, op)(**made), found)
    torch.testing.assert_close(getattr(ops, op)(**call), found)
