"""What makes calls different kinds: shapes, layouts, dtypes, values, and torch's settings."""

from contextlib import contextmanager

import pytest
import torch
from graph_fakes import DEVICES, Fake, Plain, X, assert_same, on_device, runner_of
from torch import nn

import fastvit


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    with on_device(monkeypatch, request.param):
        yield request.param


KINDS = {
    "batch": X[:1],
    "image size": torch.randn(8, 12, 4, 4),
    "dtype": X.double(),
    "layout": X.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("other", KINDS.values(), ids=KINDS)
def test_each_kind_of_call_has_its_graph(other):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    assert_same(runner, other, captures=2)
    assert_same(runner, X, captures=2)
    assert_same(runner, other, captures=2)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, float16": lambda: torch.autocast("cpu", torch.float16),
    "use_backend": lambda: fastvit.use_backend("reference"),
    "use_backend, one op": lambda: fastvit.use_backend(attention="reference"),
    "sdpa": lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    "tf32": lambda: tf32(),
    "MKL-DNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "default dtype": lambda: float64(),
    "deterministic": lambda: torch.backends.cudnn.flags(deterministic=True),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_has_its_graph(setting):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    with setting():
        assert_same(runner, X, captures=2)
    assert_same(runner, X, captures=2)
    with setting():
        assert_same(runner, X, captures=2)


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_casts_in_autocasts_cache_are_not_captured():
    seen = []

    class Asks(Plain):
        def forward(self, x):
            seen.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    runner = runner_of(Asks())
    with torch.autocast("cpu", torch.bfloat16):
        runner.capture(X)
        assert torch.is_autocast_cache_enabled()
    assert Fake.captures == 2
    assert not any(seen)


LAYOUTS = {
    "channels last": X.to(memory_format=torch.channels_last),
    "a crop": torch.randn(8, 3, 12, 12)[:, :, 2:10, 1:9],
    "expanded": X[:1].expand(8, -1, -1, -1),
    "one image": torch.randn(8, 8, 3).permute(2, 0, 1)[None],  # whose batch has the stride of a pixel
}
ORDERS = {"channels last": (0, 2, 3, 1), "one image": (0, 2, 3, 1)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_layouts(name):
    class Strides(Plain):
        def forward(self, x):
            strides.append(x.stride())
            return super().forward(x)

    strides, x = [], LAYOUTS[name]
    runner = runner_of(Strides())
    runner(x)
    order = ORDERS.get(name, (0, 1, 2, 3))
    expected = torch.empty_permuted(x.shape, order).stride()
    assert set(strides) == {expected}
    assert_same(runner, x, captures=1)


def test_zeros_of_both_signs():
    class Divides(nn.Module):
        def forward(self, x, by):
            return torch.ones_like(x) / torch.full_like(x, by)

    runner = runner_of(Divides())
    assert_same(runner, X, 0.0, captures=1)
    assert_same(runner, X, -0.0, captures=2)
