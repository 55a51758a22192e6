"""Copies of frozen weights follow them through everything that changes a weight, and leave no trace."""

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
from native_calls import needs_library
from torch import nn

from fastvit import derived, refresh

pytestmark = needs_library()


@pytest.fixture(autouse=True)
def _nothing_kept():
    derived.refresh()
    yield
    derived.refresh()


class Doubled(nn.Module):
    """A module that reads a derived tensor, and counts how often it was derived."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.count = 0

    def derive(self):
        self.count += 1
        return 2 * self.weight + self.bias

    def forward(self):
        value = derived.kept("doubled", (self.weight, self.bias, None), self.derive)
        return self.derive() if value is None else value


@pytest.fixture
def model():
    model = Doubled()
    with torch.no_grad():
        assert model() is model()
    assert model.count == 1
    return model


def assert_follows(model):
    with torch.no_grad():
        torch.testing.assert_close(model(), 2 * model.weight + model.bias, rtol=0, atol=0)


def assert_derived_anew(model):
    count = model.count
    assert_follows(model)
    assert model.count == count + 1
    assert_follows(model)
    assert model.count == count + 1


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1.0),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1.0, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_optimizer_step(model, optimizer, name):
    parameter = getattr(model, name)
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer([parameter]).step()
    assert not torch.equal(parameter, before)
    assert_derived_anew(model)


def test_a_step_that_leaves_bits_as_they_are_drops_what_it_was_told_to_change(model):
    model.weight.grad = torch.zeros(4, 3)
    torch.optim.SGD([model.weight], lr=1.0, fused=True).step()
    assert derived.everything() == []


def test_another_models_optimizer_leaves_it_alone(model):
    other = Doubled()
    other.weight.grad = torch.ones(4, 3)
    torch.optim.AdamW(other.parameters(), fused=True).step()
    assert_follows(model)
    assert model.count == 1


EDITS = {
    "in place": lambda m: m.weight.mul_(3),
    "in place, of the second source": lambda m: m.bias.mul_(3),
    "in place, where no sample sees it": lambda m: m.weight[0, 1].add_(1),
    "load_state_dict": lambda m: m.load_state_dict(Doubled().state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(Doubled().state_dict(), assign=True),
    "half": nn.Module.half,
    "half and back": lambda m: m.half().float(),
    "to": lambda m: m.to(torch.float64),
    "another tensor as data": lambda m: setattr(m.weight, "data", torch.randn(4, 3)),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(4, 3))),
    "another view of the same memory": lambda m: setattr(m.weight, "data", m.weight.data.view(3, 4).T),
    "through data": lambda m: m.weight.data.mul_(3),
    "through data, one row": lambda m: m.weight.data[2].mul_(3),
    "through data, an element of a vector": lambda m: m.bias.data[1].add_(1),
    "through NumPy": lambda m: m.weight.numpy().__imul__(3),
    "under inference_mode": torch.inference_mode()(lambda m: m.weight.mul_(3)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_an_edit(model, edit):
    edit(model)
    assert_derived_anew(model)


def test_half_and_back_where_the_memory_is_the_same_again(model):
    """float32 weights at the address of the old ones, of the same version, with other numbers."""
    address = model.weight.data_ptr()
    for _ in range(1000):
        model.half().float()
        if model.weight.data_ptr() == address:
            break
    assert_follows(model)


@pytest.mark.parametrize("argument", [True, False], ids=["the model", "everything"])
def test_one_element_through_data_needs_refresh(model, argument):
    with torch.no_grad():
        stale = model()
        model.weight.data[0, 1] += 1  # of the first row it is the first element that is looked at
        assert model() is stale
        refresh(*[model] * argument)
    assert_derived_anew(model)


def test_refresh_leaves_other_models_alone(model):
    refresh(Doubled())
    with torch.no_grad():
        model()
    assert model.count == 1


def test_refresh_frees_what_dies_as_it_looks():
    """A copy that owns the only storage of another copy's source, as a joined weight once did."""
    with torch.no_grad():
        models = [Doubled() for _ in range(3)]
        for model in models:
            inner = derived.kept("inner", (model.weight,), lambda model=model: model.weight * 2)
            derived.kept("outer", (inner,), lambda inner=inner: inner + 1)
            del inner
        for model in models:
            refresh(model)
    assert derived.everything() == []


def test_nothing_is_kept_while_gradients_are_recorded(model):
    for _ in range(2):
        model().sum().backward()
    assert model.count == 3
    assert model.weight.grad.eq(4).all()


def test_nothing_is_kept_of_inference_tensors_and_other_types():
    with torch.inference_mode():
        model = Doubled()
        model(), model()
    assert model.count == 2
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        model = Doubled()
        model(), model()
    assert model.count == 2
    assert derived.everything() == []


def test_inference_mode_reads_and_keeps_for_ordinary_parameters(model):
    with torch.inference_mode():
        model()
    assert model.count == 1


def test_copies_and_files_hold_nothing_derived(model):
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert model.state_dict().keys() == other.state_dict().keys() == {"weight", "bias"}
    assert buffer.tell() < 4096
    with torch.no_grad():
        other.weight.mul_(3)
    assert_derived_anew(other)
    with torch.no_grad():
        model()
    assert model.count == 1


@pytest.mark.parametrize("change", [lambda m: None, nn.Module.double], ids=["deleted", "of another dtype"])
def test_dies_with_the_memory_of_the_weight(change):
    model = Doubled()
    with torch.no_grad():
        value = weakref.ref(model())
    assert value() is not None
    model = change(model)
    gc.collect()
    assert value() is None
    assert derived.everything() == []


def test_parameters_can_be_swapped(model):
    other = Doubled()
    torch.utils.swap_tensors(model.weight, other.weight)
    assert_derived_anew(model)


def test_names_are_apart(model):
    with torch.no_grad():
        ones = derived.kept("ones", (model.weight,), lambda: torch.ones(4))
        assert derived.kept("ones", (model.weight,), lambda: torch.zeros(4)) is ones
    assert_follows(model)


def test_an_exit_with_copies_is_silent():
    code = (
        "import torch; from fastvit import derived\n"
        "w = torch.nn.Parameter(torch.randn(4, 4))\n"
        "with torch.no_grad():\n"
        "    assert derived.kept('x', (w,), lambda: w + 1) is not None\n"
        "import sys; sys.modules['late'] = w"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
