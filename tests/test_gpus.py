"""Facts of a GPU are asked of torch once, of each by its index."""

from types import SimpleNamespace

import pytest
import torch

from fastvit import gpus


@pytest.fixture
def asked(monkeypatch):
    """Two GPUs in use; which of them torch was asked about."""
    indices = []

    def properties(index):
        indices.append(index)
        return SimpleNamespace(name=f"GPU {index}", major=9, minor=index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpus._with_index.cache_clear()
    yield indices
    gpus._with_index.cache_clear()


def test_each_gpu_is_asked_about_once(asked):
    for _ in range(3):
        assert gpus.gpu_of(torch.device("cuda", 0)) == gpus.Gpu("GPU 0", (9, 0))
        assert gpus.gpu_of(torch.device("cuda")) == gpus.gpu_of() == gpus.Gpu("GPU 1", (9, 1))
    assert asked == [0, 1]


def test_one_that_is_assumed_comes_first(asked):
    with gpus.assume_arch("sm_80"):
        assert gpus.gpu_of(torch.device("cuda", 0)).capability == (8, 0)
    assert gpus.gpu_of(torch.device("cuda", 0)).capability == (9, 0)
    assert asked == [0]


def test_a_gpu_in_use_is_not_looked_for(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for"))
    assert gpus.is_there()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not gpus.is_there()
