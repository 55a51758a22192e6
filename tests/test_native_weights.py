"""Weights as they lie, and packed and folded ones, follow everything that changes a parameter."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from native_calls import OPS, needs_library
from op_checks import within_contract
from weight_changes import CHANGES, Layer, edited

from fastvit import derived, ops, reference, use_backend

pytestmark = needs_library()


@pytest.fixture(autouse=True)
def _cpp():
    derived.refresh()
    with use_backend("cpp"):
        yield
    derived.refresh()


def _kept():
    """Every packed or folded weight there is."""
    return [copy.value[0] for copy in derived.everything()]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(op, change, frozen):
    model = Layer(op, frozen=frozen)
    before = model.judged()
    assert bool(_kept()) == frozen
    state = {name: value.clone() for name, value in model.state_dict().items()}
    changed = change(model) or model
    after = changed.judged()
    assert not torch.equal(after.to(before.dtype), before)
    assert torch.equal(after, changed.judged())
    if changed is not model:  # and the first is as it was
        torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
        assert torch.equal(model.judged(), before)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name, _ in Layer(op).named_parameters()]
)
def test_a_change_of_each_parameter_alone_is_seen(op, name):
    model = Layer(op)
    before = model.judged()
    with torch.no_grad():
        getattr(model, name)[0] += 1
    assert not torch.equal(model.judged(), before)


@pytest.mark.parametrize("op", OPS[1:])
def test_a_layer_scale_that_comes_and_goes_is_seen(op):
    call = Layer(op).call()
    function = partial(getattr(ops, op), frozen=True)
    for scale in (call["layer_scale"], None, call["layer_scale"].clone(), call["layer_scale"]):
        within_contract(op, call | {"layer_scale": scale}, function)


# Parameters in float32 as they are, and cast under autocast, one after another.
@pytest.mark.parametrize("op", OPS)
def test_dtypes_are_kept_apart(op):
    model = Layer(op)
    wide = model.judged()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model()
    assert torch.equal(model.judged(), wide)
    torch.testing.assert_close(low.float(), wide, rtol=0.05, atol=0.05)
    assert not torch.equal(low.float(), wide)


@pytest.mark.parametrize("op", OPS)
def test_parameters_and_their_state_are_left_alone(op):
    model = Layer(op)
    state = copy.deepcopy(model.state_dict())

    def facts():
        return [(p.data_ptr(), p._version, p.layout, p.stride()) for p in model.parameters()]

    before = facts()
    model.judged()
    assert facts() == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == set(vars(Layer(op)))


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_kept_while_gradients_are_recorded_nor_of_inference_tensors(op):
    model = Layer(op)
    model().sum().backward()
    model.function(**{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in model.call().items()})
    assert not _kept()
    with torch.inference_mode():
        inference = Layer(op)
        inference()
    assert not _kept()
    with torch.inference_mode():  # of ordinary parameters something may be kept
        found = model()
    assert torch.equal(found, model.judged())


@pytest.mark.parametrize("op", OPS)
def test_a_packed_weight_dies_with_its_parameter(op):
    model = Layer(op)
    model.judged()
    packed = [weakref.ref(value) for value in _kept()]
    assert packed
    assert all(reference() is not None for reference in packed)
    del model
    gc.collect()
    assert [reference() for reference in packed] == [None] * len(packed)
    assert not _kept()


# A bias that is made of others at each call, as EVA's is, does not keep the weight from being kept.
def test_several_weights_and_a_bias_made_for_the_call():
    call = {"x": torch.randn(3, 11, 40), "norm_weight": None, "norm_bias": None}
    weights = [torch.nn.Parameter(torch.randn(40, 40) / 6) for _ in range(3)]
    biases = [torch.nn.Parameter(torch.randn(40)) for _ in range(3)]
    for weight, bias in (
        (tuple(weights), tuple(biases)),
        (tuple(weights), (biases[0], None, biases[2])),
        (weights[0], lambda: biases[0] + 0),
    ):
        for _ in range(2):
            given = call | {"weight": weight, "bias": bias() if callable(bias) else bias}
            with torch.no_grad():
                found = ops.layer_norm_linear(**given, frozen=True)
            kept = derived.everything()
            torch.testing.assert_close(found, reference.layer_norm_linear(**given), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            ops.layer_norm_linear(**given, frozen=True)
        assert kept and derived.everything() == kept
        derived.refresh()


# Each change drops what was packed before it. By weak references, as torch's own memory is pooled.
@pytest.mark.parametrize("op", OPS)
def test_memory_is_bounded_over_a_hundred_changes(op):
    model, packed = Layer(op), []
    for _ in range(100):
        edited(model, 1 / 1.5 if len(packed) % 2 else 1.5)
        with torch.no_grad():
            model()
        packed.append([weakref.ref(value) for value in _kept()])
    alive = [sum(reference() is not None for reference in references) for references in packed]
    assert alive == [0] * 99 + [len(packed[0])]
