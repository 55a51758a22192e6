"""What is looked at of weights: an element of every row, wherever and however they lie."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from native_calls import needs_library

from fastvit import weight_samples
from fastvit.weight_samples import Sample, can_sample

pytestmark = needs_library()
WEIGHTS = {
    "a matrix": torch.randn(7, 5),
    "a transposed one": torch.randn(5, 7).T,
    "a part of one": torch.randn(9, 12)[1:8, 3:8],
    "a convolution's": torch.randn(6, 3, 4, 4),
    "a token": torch.randn(1, 1, 8),
    "in bfloat16": torch.randn(7, 5).bfloat16(),
    "in float64": torch.randn(7, 5).double(),
    "of one column": torch.randn(7, 1),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_write_of_any_row_is_seen(weight):
    weight = weight.clone(memory_format=torch.preserve_format) if weight.is_contiguous() else weight
    sample = Sample([weight])
    assert not sample.differs()
    for row in weight:
        old = row.clone()
        row.add_(1)
        assert sample.differs()
        row.copy_(old)
        assert not sample.differs()


def test_of_a_vector_every_element_is_looked_at():
    weight, vector = torch.randn(4, 3), torch.randn(12)[::2]
    sample = Sample([weight, vector])
    for i in range(len(vector)):
        vector[i] += 1
        assert sample.differs()
        sample.take()
        assert not sample.differs()


def test_rows_are_looked_at_in_different_columns():
    weight = torch.zeros(768, 768)
    sample, seen = Sample([weight]), 0
    for column in range(0, 768, 32):
        weight[:, column] += 1
        seen += sample.differs()
        sample.take()
    assert seen == 24


def test_bits_are_compared_and_not_numbers():
    weight = torch.zeros(2, 2)
    sample = Sample([weight])
    weight.neg_()
    assert sample.differs()
    weight.fill_(torch.nan)
    sample.take()
    assert not sample.differs()


def test_what_cannot_be_looked_at():
    assert can_sample([torch.zeros(2, 2), torch.zeros(3)])
    assert not can_sample([torch.zeros(2, 2), torch.zeros(0)])
    assert not can_sample([torch.zeros(2, 3, 4).transpose(0, 2)])
    assert not can_sample([torch.zeros(2, device="meta")])


def test_on_a_gpu_it_answers_for_the_looks_before(monkeypatch):
    """The CUDA library's part played by the CPU's, when the stream comes to it."""
    cpu, queue = weight_samples._library("cpu"), []

    def look(weights, count, sample, seen, stream):
        def run():
            if seen is None:
                cpu.fastvit_take_sample(weights, count, sample)
            elif cpu.fastvit_sample_differs(weights, count, sample):
                ctypes.c_int.from_address(seen).value = 1

        queue.append(run)
        return 0

    def synchronize():
        while queue:
            queue.pop(0)()

    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(
        weight_samples, "_library", lambda device: SimpleNamespace(fastvit_sample_on_device=look)
    )
    monkeypatch.setattr(weight_samples, "_is_on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(weight_samples, "_flags", [])
    weight = torch.randn(4, 3)
    sample = Sample([weight])
    assert not sample.differs()
    synchronize()
    weight.data.mul_(2)
    assert not sample.differs()  # it has begun to look
    assert not sample.differs(look=False)
    synchronize()
    assert sample.differs()
    synchronize()
    sample.take()
    assert not sample.differs(look=False)
    synchronize()
    assert not sample.differs()
    synchronize()
    seen = sample._seen
    sample.differs()
    weight.data.mul_(2)
    del sample  # while it looks: what is written then is nobody else's memory
    assert [flag is seen for flag in weight_samples._flags] == [True]
    synchronize()
    again = Sample([weight])
    assert again._seen is seen
    assert not again.differs()
