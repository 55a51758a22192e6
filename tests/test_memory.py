"""The red zones catch what they are for: reads out of bounds, stray writes, elements never written."""

import pytest
import torch
from memory import Canaries, guarded, poisoned_empty

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)


def _strided() -> dict[str, torch.Tensor]:
    base = torch.arange(2.0 * 6 * 8).reshape(2, 6, 8)
    return {
        "contiguous": base,
        "transposed": base.transpose(1, 2),
        "sliced": base[:, 1::2, 3:7],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(8.0).expand(4, 8),
        "overlapping": torch.arange(8.0).as_strided((4, 3), (1, 2)),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("layout", _strided())
@pytest.mark.parametrize("misalign", [0, 1])
def test_a_guarded_copy_is_equal_and_strided_alike(layout, misalign):
    tensor = _strided()[layout]
    copy = guarded(tensor, misalign=misalign)
    torch.testing.assert_close(copy, tensor, rtol=0, atol=0)
    assert copy.stride() == tensor.stride()
    assert copy.storage_offset() % 64 == misalign


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_can_be_guarded(dtype):
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert guarded(tensor).equal(tensor)


def test_a_guarded_copy_keeps_requires_grad_and_is_a_leaf():
    copy = guarded(torch.ones(3, requires_grad=True))
    copy.sum().backward()
    assert copy.is_leaf
    assert copy.grad.equal(torch.ones(3))


@pytest.mark.parametrize("start", [-1, 1, 40])
def test_a_read_out_of_bounds_is_nan(start):
    x = guarded(torch.ones(2, 17))
    assert x.as_strided((2, 17), (17, 1), x.storage_offset() + start).sum().isnan()


def test_a_read_between_the_rows_of_a_slice_is_nan():
    x = guarded(torch.ones(4, 8)[:, :5])
    assert x.as_strided((4, 6), (8, 1), x.storage_offset()).isnan().sum() == 4


def test_an_element_never_written_is_caught():
    canaries = Canaries()
    out = canaries.empty(3, 5, dtype=torch.float16)
    out[:, :4] = torch.nan  # a NaN of the kernel's own is written all the same
    with pytest.raises(AssertionError, match=r"3 elements never written.*\[0, 4\]"):
        canaries.check_written()
    out[:, 4] = 1
    canaries.check_written()
    canaries.check_bands()


@pytest.mark.parametrize("start", [-1, 15, 200])
def test_a_stray_write_is_caught(start):
    canaries = Canaries()
    out = canaries.empty(3, 5)
    out.as_strided((1,), (1,), out.storage_offset() + start).zero_()
    with pytest.raises(AssertionError, match=rf"1 stray writes.*first \[{start}\] elements"):
        canaries.check_bands()


ALLOCATIONS = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "empty of a size": lambda dtype: torch.empty(size=(2, 3), dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(2, 3, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (1, 2), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(2, 3),
    "inside torch": lambda dtype: torch.ops.aten.empty.memory_format([2, 3], dtype=dtype),
    "resized": lambda dtype: torch.zeros(0, dtype=dtype).resize_(2, 3),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_uninitialised_memory_is_nan(allocation, dtype):
    with poisoned_empty():
        out = ALLOCATIONS[allocation](dtype)
    assert (out.shape, out.dtype) == ((2, 3), dtype)
    assert out.isnan().all()


def test_uninitialised_integers_are_not_zero():
    with poisoned_empty():
        assert torch.empty(4, dtype=torch.uint8).all()
        assert torch.empty(4, dtype=torch.int64).all()


@torch.library.custom_op("fastvit_memory_test::forgets_the_last", mutates_args=())
def _forgets_the_last(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:-1] = x[:-1]
    return out


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x).copy_(2 * x)

    @staticmethod
    def backward(ctx, grad):
        dx = torch.empty_like(grad)
        dx[1:] = 2 * grad[1:]
        return dx


def test_a_registered_op_and_a_backward_are_poisoned_too():
    x = torch.ones(4, requires_grad=True)
    with poisoned_empty() as canaries:
        assert _forgets_the_last(torch.ones(4)).isnan().tolist() == [False] * 3 + [True]
        out = _Twice.apply(x)
        out.mul_(1).sum().backward()
    assert x.grad.isnan().tolist() == [True] + [False] * 3
    with pytest.raises(AssertionError, match="never written"):
        canaries.check_written()


def _overruns() -> None:
    with poisoned_empty():
        out = torch.empty(4)
        out.as_strided((1,), (1,), out.storage_offset() + 4).zero_()


def test_a_stray_write_beside_an_allocation_is_caught_on_leaving():
    with pytest.raises(AssertionError, match="stray"):
        _overruns()


def test_torch_is_as_it_was_afterwards():
    before = torch.empty, torch.get_deterministic_debug_mode()
    with poisoned_empty():
        assert torch.are_deterministic_algorithms_enabled()
    assert before == (torch.empty, torch.get_deterministic_debug_mode())
