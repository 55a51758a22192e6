"""Where the numbers lie in memory changes nothing: strides, offsets and neighbours."""

import op_cases
import plain_ops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import guarded, poisoned_empty
from op_checks import GRADS, gradients

from fastvit import ops
from fastvit.regimes import OPS


def offset(tensor):
    """One element into its storage, where no vector load is aligned."""
    return _beside_nan(tensor, (tensor.numel() + 1,))[1:].view(tensor.shape).copy_(tensor)


def sliced(tensor):
    """The middle of a wider last dimension."""
    *rest, last = tensor.shape
    return _beside_nan(tensor, (*rest, last + 3))[..., 1 : last + 1].copy_(tensor)


def strided(tensor):
    """Every other element of the last dimension, every third of the first."""
    first, *rest = tensor.shape
    wide = (3 * first, *rest[:-1], 2 * rest[-1]) if rest else (3 * first,)
    every = (slice(None, None, 3), ..., slice(None, None, 2)) if rest else slice(None, None, 3)
    return _beside_nan(tensor, wide)[every].copy_(tensor)


def transposed(tensor):
    """The first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(tensor):
    """The second dimension innermost: of four, torch's own channels_last."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.ndim > 1 else tensor


def _beside_nan(tensor, size):
    return tensor.new_full(size, torch.nan if tensor.is_floating_point() else 1)


LAYOUTS = (offset, sliced, strided, transposed, channels_last)


# Every tensor of the call at once; one at a time is left to the fuzz below.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_equal_contiguous_ones(op, layout):
    call = op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op])
    moved = op_cases.converted(call, layout)
    function = getattr(ops, op)
    out = function(**moved)
    torch.testing.assert_close(out, function(**call))
    assert out.is_contiguous()
    torch.testing.assert_close(
        gradients(function, moved, GRADS["contiguous"]), gradients(function, call, GRADS["contiguous"])
    )


def test_the_layouts_are_what_they_say():
    tensor = torch.randn(2, 3, 4, 5)
    assert offset(tensor).storage_offset() == 1
    assert [sliced(tensor).stride(dim) for dim in (2, 3)] == [8, 1]
    assert strided(tensor).stride(3) == 2
    assert transposed(tensor).stride(0) == 1
    assert channels_last(tensor).is_contiguous(memory_format=torch.channels_last)
    for layout in LAYOUTS:
        for shape in ((2, 3, 4, 5), (3,), (0, 4), (1, 1)):
            tensor = torch.randn(shape)
            assert layout(tensor).equal(tensor)


# One sample seen by every image of the batch: stride 0, as broadcast residuals and masks come.
@pytest.mark.parametrize(
    ("op", "name"), [("linear_residual", "residual"), ("layer_norm_mlp", "x"), ("attention", "qkv")]
)
def test_expanded_inputs(op, name):
    call = op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op])
    expanded = call | {name: call[name][:1].expand_as(call[name])}
    out = getattr(ops, op)(**expanded)
    torch.testing.assert_close(out, getattr(ops, op)(**expanded | {name: expanded[name].contiguous()}))
    assert out.is_contiguous()


# Aligned and off by one element. Dropped: half precision, which reads the same elements.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("misalign", [0, 1])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, sliced, transposed])
def test_nothing_is_read_beside_the_inputs(op, misalign, layout):
    call = op_cases.converted(op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op]), layout)
    expected = getattr(ops, op)(**call)
    expected_gradients = gradients(getattr(ops, op), call, GRADS["contiguous"])
    call = op_cases.converted(call, lambda tensor: guarded(tensor, misalign=misalign))
    with poisoned_empty():
        out = getattr(ops, op)(**call)
        found = gradients(getattr(ops, op), call, GRADS["contiguous"])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, expected_gradients)


SIZES = {
    "patch_embed": {"grid": st.tuples(st.integers(1, 3), st.integers(1, 3)), "channels": st.integers(1, 4)},
    "layer_norm_linear": {
        "tokens": st.integers(1, 9),
        "width": st.integers(1, 33),
        "out": st.integers(1, 17),
    },
    "attention": {"tokens": st.integers(3, 19), "heads": st.integers(1, 3), "head_dim": st.integers(1, 20)},
    "linear_residual": {
        "tokens": st.integers(1, 9),
        "width": st.integers(1, 17),
        "inner": st.integers(1, 33),
    },
    "layer_norm_mlp": {
        "tokens": st.integers(1, 9),
        "width": st.integers(1, 17),
        "hidden": st.integers(1, 33),
    },
}


@st.composite
def calls(draw, op):
    """A call of any size, with any of the options, and each tensor laid out in its own way."""
    sizes = {name: draw(strategy) for name, strategy in SIZES[op].items()}
    options = draw(st.sampled_from(op_cases.cells(op)))
    if options.get("rope"):
        sizes["head_dim"] += sizes["head_dim"] % 2
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    call = op_cases.build(op, dtype=dtype, batch=draw(st.integers(0, 3)), **options | sizes)
    return op_cases.converted(
        call, lambda tensor: draw(st.sampled_from((torch.Tensor.contiguous, *LAYOUTS)))(tensor)
    )


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_any_size_in_any_layout(op, data):
    call = data.draw(calls(op))
    out = getattr(ops, op)(**call)
    truth = getattr(plain_ops, op)(**op_cases.float64(op_cases.converted(call, torch.Tensor.contiguous)))
    assert out.is_contiguous()
    # Loose in float32, where a norm over two near equal channels magnifies any rounding; NaN is not near.
    tolerance = 1e-3 if out.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(out, truth.to(out.dtype), rtol=tolerance, atol=tolerance)
