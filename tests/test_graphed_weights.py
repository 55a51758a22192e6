"""A graphed model follows its weights: edited in place without a capture, replaced with another one."""

import pytest
import torch
from accelerated import images, pair
from graph_fakes import DEVICES, Fake, Mixed, Model, Plain, X, assert_same, on_device, runner_of, runners
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastvit
from fastvit import derived, graph_watch


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    with on_device(monkeypatch, request.param):
        yield request.param


def stepped(optimizer, **options):
    def step(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), lr=0.1, **options).step()

    return step


def refreshed(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    fastvit.refresh(model)


def all_refreshed(model):
    model.gamma.data.mul_(1.5)
    model.head.weight.data[0, 1] += 1  # which no sample is sure to see
    fastvit.refresh()


def as_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


IN_PLACE = {
    "in place": in_place,
    "gamma": lambda m: m.gamma.add_(1),
    "a buffer": lambda m: m.norm.running_mean.add_(1),
    "load_state_dict": lambda m: m.load_state_dict(Model(seed=1).state_dict()),
    "fused AdamW": stepped(torch.optim.AdamW, fused=True),
    "fused SGD": stepped(torch.optim.SGD, fused=True),
    "Adam": stepped(torch.optim.Adam, foreach=False),
    "through data": as_data,
    "through data, and refresh": refreshed,
    "through data, and refresh of all": all_refreshed,
}
REPLACED = {
    "load_state_dict, assigned": lambda m: m.load_state_dict(Model(seed=1).state_dict(), assign=True),
    "to float64": nn.Module.double,
    "bfloat16": nn.Module.bfloat16,
    "half and back": lambda m: m.bfloat16().float(),
    "another tensor as data": lambda m: setattr(m.embed.weight, "data", torch.randn(6, 192)),
    "other strides of the same memory": lambda m: setattr(
        m.embed.weight, "data", m.embed.weight.data.as_strided((6, 192), (1, 6))
    ),
    "a part of itself as data": lambda m: setattr(m.head.bias, "data", m.head.bias.data[:1]),
    "another parameter": lambda m: setattr(m, "gamma", nn.Parameter(torch.randn(4))),
    "another buffer": lambda m: setattr(m.norm, "running_var", torch.rand(6) + 1),
    "another module": lambda m: setattr(m, "embed", nn.Linear(192, 6).eval()),
    "a parameter is gone": lambda m: setattr(m.embed, "bias", None),
    "a module more": lambda m: m.embed.add_module("more", nn.Identity().eval()),
    "a patched forward": lambda m: setattr(m.norm, "forward", lambda x: x),
    "another class": lambda m: setattr(m, "__class__", Negated),
}


class Negated(Model):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE)
def test_edits_in_place_are_followed_without_a_capture(edit):
    runner = runner_of()
    before = assert_same(runner, X, captures=1)
    assert_same(runner, X[:1], captures=2)
    for _ in range(2):
        edit(runner.model)
        runner.model.zero_grad()
        assert not torch.equal(assert_same(runner, X, captures=2), before)
        assert_same(runner, X[:1], captures=2)


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_what_is_replaced_or_moved_is_captured_again(change):
    runner = runner_of()
    assert_same(runner, X, captures=1)
    assert_same(runner, X[:1], captures=2)
    change(runner.model)
    assert_same(runner, X, captures=3)
    assert_same(runner, X[:1], captures=4)
    assert_same(runner, X, captures=4)
    assert Fake.renewals  # of a pool whose graphs are gone torch takes none again


@pytest.mark.parametrize("edit", [in_place, stepped(torch.optim.AdamW, fused=True), refreshed])
def test_of_plain_weights_nothing_is_derived_or_captured_again(edit, monkeypatch):
    runner = runner_of(Plain())
    assert_same(runner, X, captures=1)
    replays = Fake.replays
    monkeypatch.setattr(derived.Reading, "derive", lambda self: pytest.fail("derived anew"))
    edit(runner.model)
    assert_same(runner, X, captures=1)
    assert Fake.replays == replays + 1


def test_another_models_optimizer_costs_no_capture():
    runner, other = runner_of(), Model(seed=1)
    assert_same(runner, X, captures=1)
    stepped(torch.optim.AdamW, fused=True)(other)
    assert_same(runner, X, captures=1)


def test_what_is_derived_is_shared_with_the_model_and_between_graphs():
    runner = runner_of()
    runner.model(X)
    (copy,) = derived.everything()
    runner(X), runner(X[:1])
    (again,) = derived.everything()
    assert again is copy
    for bucket in runner._buckets.values():
        assert [read[0] for read in bucket.reading._reads.values()] == [copy]


def test_the_memory_that_a_graph_reads_is_not_freed():
    model = Model()
    memory, watch = StorageWeakRef(model.embed.weight.untyped_storage()), graph_watch.Watch(model)
    model.double()
    assert not memory.expired()
    assert watch.changed()
    del watch
    assert memory.expired()


def test_derived_tensors_live_as_long_as_the_graph():
    runner = runner_of()
    runner(X)
    derived.refresh()
    assert derived.everything() == []
    assert_same(runner, X, captures=1)


def test_an_input_that_is_edited_beside_a_weight_that_was():
    class Normalizes(Model):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.2))

    runner = runner_of(Normalizes())
    for captures in (1, 1, 1):
        assert torch.equal(runner(X.clone()), runner.model(X.clone()))
        assert Fake.captures == captures
        runner.model.gamma.mul_(1.5)


def test_an_index_beyond_a_table_that_has_grown():
    runner = runner_of(nn.Sequential(nn.Embedding(10, 4)))
    assert_same(runner, torch.arange(8), captures=1)
    runner.model[0] = nn.Embedding(20, 4).eval()
    assert_same(runner, torch.arange(8, 16), captures=2)


def test_inside_inference_mode():
    runner = runner_of()
    with torch.inference_mode():
        runner.model(X)  # what is derived here, inference tensors, is followed outside too
        assert_same(runner, X, captures=1)
    runner.model.gamma.mul_(2)
    assert_same(runner, X, captures=1)
    with torch.inference_mode():
        runner.model.gamma.mul_(2)  # which raises no version
    assert_same(runner, X, captures=1)


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        model = Model()
    runner = runner_of(model)
    assert_same(runner, X, captures=1)
    assert derived.everything() == []
    with torch.inference_mode():
        model.gamma.mul_(2)
    assert_same(runner, X, captures=1)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_accelerated_models(mode):
    _, fast = pair(mode=mode)
    runner, x = runner_of(fast), images(8)
    assert_same(runner, x, captures=1)
    fast.blocks[0].mlp.fc2.weight.mul_(1.5)
    assert_same(runner, x, captures=1)
    fastvit.accelerate(fast, mode="train" if mode == "inference" else "inference")
    assert_same(runner, x, captures=2)
    fastvit.restore(fast)
    assert_same(runner, x, captures=3)


def test_a_model_that_is_never_the_same_stops_being_captured(monkeypatch):
    monkeypatch.setattr(runners, "MOST_IN_VAIN", 3)
    runner = runner_of()
    for _ in range(9):
        runner.model.gamma = nn.Parameter(runner.model.gamma + 1)
        assert torch.equal(runner(X), runner.model(X))
    assert Fake.captures == 4 - 1
    runner.reset()
    assert_same(runner, X, captures=4)


def test_there_is_a_limit_to_graphs(monkeypatch):
    monkeypatch.setattr(runners, "MOST_BUCKETS", 2)
    runner = runner_of(Mixed())
    for scale in (1.0, 2.0):
        assert_same(runner, X, scale, captures=int(scale))
    assert_same(runner, X, 3.0)
    assert "reset" in runner.explain()
