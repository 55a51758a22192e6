"""Calls of the compiled CPU ops out of the ordinary: strides, masks, NaN, empty batches, threads."""

import op_cases
import plain_ops
import pytest
import torch
from memory import guarded, poisoned_empty
from native_calls import DTYPES, FIXED, OPS, leaves, needs_library, trained, while_training
from op_checks import GRADS, TIGHT, gives_what_is_needed, gradients
from test_op_gradients import SMALL, TRAINED
from test_op_layouts import LAYOUTS, sliced, transposed

from fastvit import BackendUnavailable, ops, use_backend
from fastvit.backends import resolve

pytestmark = needs_library()
MLP = "layer_norm_mlp"
# More than the 16 rows from which on oneDNN has the products, and than the 32 that are summed at once.
LARGE = {"batch": 3, "tokens": 15}


@pytest.fixture(autouse=True)
def _cpp():
    with use_backend("cpp"):
        yield


@pytest.mark.parametrize("op", OPS)
def test_every_mask_of_needed_gradients(op):
    call = op_cases.build(op, **op_cases.FULL[op] | SMALL[op])
    names = [name for name in TRAINED[op] if name not in FIXED]
    everything = trained(op, call)
    gives_what_is_needed(op, call, names, everything, **TIGHT)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["simple", "full"])
@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_nothing_in_gives_nothing_and_gradients_of_zero(op, dtype, options, empty):
    call = op_cases.build(op, dtype=dtype, **{empty: 0}, **op_cases.FULL[op] if options == "full" else {})
    expected = getattr(plain_ops, op)(**call)
    with torch.no_grad():
        found = getattr(ops, op)(**call)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    for name, gradient in trained(op, call).items():
        assert gradient.shape == call[name].shape
        assert gradient.count_nonzero() == 0


# Where torch itself gives strided inputs another kernel, the bits may differ; nothing else may.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [{}, LARGE], ids=["few rows", "more"])
def test_strided_inputs_equal_contiguous_ones(op, layout, sizes):
    call = op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op], **sizes)
    moved, function = op_cases.converted(call, layout), getattr(ops, op)
    with torch.no_grad():
        out = function(**moved)
        torch.testing.assert_close(out, function(**call))
    assert out.is_contiguous()
    torch.testing.assert_close(function(**leaves(moved)), out)
    torch.testing.assert_close(trained(op, moved), trained(op, call))


# Dropped: half precision, which reads the same elements.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("misalign", [0, 1])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, sliced, transposed])
def test_nothing_is_read_beside_the_inputs_and_everything_is_written(op, misalign, layout):
    call = op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op], **LARGE)
    call = op_cases.converted(call, layout)
    expected, expected_gradients = getattr(ops, op)(**call), trained(op, call)
    call = op_cases.converted(call, lambda tensor: guarded(tensor, misalign=misalign))
    with poisoned_empty():
        out, found = getattr(ops, op)(**call), trained(op, call)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, expected_gradients)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["sum", "transposed"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_strided_gradients_equal_contiguous_ones(op, kind, dtype):
    call = op_cases.build(op, dtype=dtype, **op_cases.FULL[op], **LARGE)
    contiguous = gradients(getattr(ops, op), call, lambda out: GRADS[kind](out).contiguous(), FIXED)
    torch.testing.assert_close(trained(op, call, kind), contiguous, rtol=0, atol=0)


# Of a sum of squares, whose gradient depends on the output, and of a sum, whose gradient is a constant.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("loss", [lambda out: out.square().sum(), torch.Tensor.sum], ids=["squares", "sum"])
def test_double_backward_raises(op, loss):
    call = leaves(op_cases.build(op))
    (gradient,) = torch.autograd.grad(loss(getattr(ops, op)(**call)), call["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        gradient.sum().backward()


def test_sample_scale_has_no_gradient_and_says_so():
    for op in ("linear_residual", MLP):
        call = op_cases.build(op)
        call["sample_scale"].requires_grad_()
        with pytest.raises(BackendUnavailable, match="cannot run: it gives no gradient to sample_scale"):
            getattr(ops, op)(**call)
        with torch.no_grad():
            getattr(ops, op)(**call)
        with use_backend("auto"):
            assert resolve(op, **call) == "reference"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(op, dtype):
    call = op_cases.build(op, dtype=dtype, **op_cases.FULL[op], batch=3, tokens=67, width=96)
    first, second = ((getattr(ops, op)(**call), *trained(op, call).values()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Each weight moves numbers and adds none up: the library's own sums are all that threads could change.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_rows_do_not_depend_on_the_number_of_threads(op, dtype, threads):
    call = op_cases.build(op, dtype=dtype, batch=3, tokens=267, width=96, **WITH_WIDTH[op])
    for name in [name for name, t in op_cases.tensors(call).items() if t.ndim == 2]:
        call[name] = torch.eye(96, dtype=dtype).flip(0)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(trained(op, call))
    for name in [name for name, gradient in found[0].items() if gradient.ndim != 2]:
        if name != "layer_scale":  # a sum over the weight's gradient, which is a product
            assert torch.equal(found[0][name], found[1][name]), name


WITH_WIDTH = {"layer_norm_linear": {"out": 96}, "linear_residual": {"inner": 96}, MLP: {"hidden": 96}}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("sizes", [{}, LARGE], ids=["few rows", "more"])
def test_a_row_that_is_not_finite_stays_alone(op, dtype, value, sizes):
    call = op_cases.build(op, dtype=dtype, **sizes)
    spoiled = call | {"x": call["x"].clone()}
    spoiled["x"][1, 2, 3] = value
    row = torch.zeros(call["x"].shape[:2], dtype=torch.bool)
    row[1, 2] = True
    for function in (torch.no_grad()(getattr(ops, op)), getattr(ops, op)):
        ours, untouched = function(**spoiled), function(**call)
        assert torch.equal(ours.isfinite(), getattr(plain_ops, op)(**spoiled).isfinite())
        assert torch.equal(ours[~row], untouched[~row])
    dx, beside = (trained(op, c)["x"] for c in (spoiled, call))
    assert torch.equal(dx[~row], beside[~row])


# Into the activation itself: through oneDNN's and, for training, the library's own. Either as in float64 or
# as torch has it in this dtype, whose gelu of infinity is nan.
@pytest.mark.parametrize("activation", op_cases.OPTIONS[MLP]["activation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30], ids=str)
def test_activations_are_finite_where_torchs_own_are(activation, dtype, value):
    call = op_cases.build(MLP, dtype=dtype, activation=activation, hidden=40, **LARGE)
    call["fc1_bias"][3] = value
    call["fc2_weight"].zero_()[:, 3] = 0.5  # that column alone
    right = [plain_ops.layer_norm_mlp(**c).to(dtype) for c in (op_cases.float64(call), call)]
    for function in (torch.no_grad()(ops.layer_norm_mlp), while_training(MLP)):
        found = function(**call)
        alike = [
            torch.equal(found.isfinite(), t.isfinite()) and torch.equal(found.isnan(), t.isnan())
            for t in right
        ]
        assert any(alike), found[0, 0]
