"""What the straight-line code of a CPU cannot stand for is found out, and runs eagerly."""

import ctypes

import numpy as np
import pytest
import torch
from cpu_graphs import replays, runner_of
from graph_fakes import Plain, X
from torch import nn


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_what_draws_numbers_runs_eagerly():
    class Draws(Plain):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    runner = runner_of(Draws())
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="it draws random numbers"):
        first = runner(X)
    assert replays(runner) == 0
    torch.manual_seed(0)
    assert torch.equal(runner.model(X), first)


@pytest.mark.parametrize("x", [X, torch.ones(8, 3, 8, 8), torch.arange(8)], ids=["images", "ones", "ids"])
def test_what_is_computed_outside_of_torch_is_found_out(x):
    class Outside(nn.Module):
        def forward(self, x):
            y = x * 2.0
            return y + ctypes.c_float.from_address(y.data_ptr()).value

    with pytest.warns(RuntimeWarning, match="a replay gives other numbers"):
        runner_of(Outside())(x)


class Lists(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x * max(x[0].tolist())


class Numpy(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x + float(np.asarray(x).max())


class NumpyMethod(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x + float(x.numpy().max())


class Catches(Plain):
    def forward(self, x):
        try:
            most = max(x.flatten().tolist())
        except Exception:
            most = 0.0
        return super().forward(x) * most


READ = {Lists: "tolist", Catches: "tolist", Numpy: "__array__", NumpyMethod: "numpy"}


@pytest.mark.parametrize("layer", READ, ids=lambda layer: layer.__name__)
def test_memory_that_is_read_past_torchs_ops(layer):
    runner = runner_of(layer())
    with pytest.warns(RuntimeWarning, match=f"Tensor.{READ[layer]} has to know numbers"):
        assert torch.equal(runner(X), runner.model(X))
    assert replays(runner) == 0


@pytest.mark.parametrize("lengths", [torch.tensor([3, 3]), torch.tensor([True, True]), torch.ones(2)])
def test_so_is_what_is_computed_of_another_argument(lengths):
    class Outside(nn.Module):
        def forward(self, x, lengths):
            memory = ctypes.c_ubyte.from_address(lengths.data_ptr() + lengths.element_size() - 1)
            return x * (memory.value + ctypes.c_ubyte.from_address(lengths.data_ptr()).value)

    with pytest.warns(RuntimeWarning, match="a replay gives other numbers"):
        runner_of(Outside())(X, lengths)
