"""accelerate and restore: what changes in a model, what does not, and what is asked of it at each call."""

import copy
import io
import pickle

import pytest
import torch
from accelerated import close, fallbacks, images, pair, run
from torch import nn
from torch.nn.utils import parametrizations, prune
from weight_changes import stepped

import fastvit

X = images()
BLOCK_OPS = {"layer_norm_linear", "attention", "linear_residual", "layer_norm_mlp"}


@pytest.fixture(params=["vit", "eva"])
def both(request):
    return pair(request.param)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_numbers_are_the_models_and_the_ops_run(both, backend):
    model, fast = both
    with fastvit.use_backend(**dict.fromkeys(BLOCK_OPS - {"attention"}, backend)):
        out, events = run(fast, X)
    close(out, run(model, X)[0])
    assert not fallbacks(events)
    assert {e.op for e in events if e.module == "" or e.op in BLOCK_OPS} >= BLOCK_OPS
    assert [e.op for e in events].count("layer_norm_mlp") == 2
    assert {e.backend for e in events if e.op in BLOCK_OPS - {"attention"}} == {backend}


def test_gradients_are_the_models(both):
    model, fast = both
    for each in both:
        each(X).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert b.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max() + 1e-3))


def test_the_object_its_keys_and_parameters_stay(both):
    model, _ = both
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    types, out = [type(m) for m in model.modules()], run(model, X)[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert fastvit.accelerate(model) is model
    assert [type(m).__name__ for m in model.modules()] == [t.__name__ for t in types]
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    run(model, X)
    assert fastvit.restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, X)[0], out)
    assert not any("_fastvit" in m.__dict__ for m in model.modules())


def test_twice_in_a_row_is_once(both):
    _, fast = both
    out, types = run(fast, X)[0], [type(m) for m in fast.modules()]
    fastvit.accelerate(fast)
    assert [type(m) for m in fast.modules()] == types
    assert torch.equal(run(fast, X)[0], out)


def _copied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("through", [_copied, _pickled, _saved])
def test_copies_are_accelerated_models_of_their_own(both, through):
    _, fast = both
    out = run(fast, X)[0]
    other = through(fast)
    result, events = run(other, X)
    assert torch.equal(result, out)
    assert not fallbacks(events)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert torch.equal(run(fast, X)[0], out)
    assert not torch.equal(run(other, X)[0], out)


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value * 0.9 for name, value in model.state_dict().items()}
    ),
    "AdamW, fused": stepped(torch.optim.AdamW, fused=True),
    "SGD": stepped(torch.optim.SGD),
    "to(float64)": lambda model: model.to(torch.float64),
    "bfloat16()": lambda model: model.bfloat16(),
    "in place": lambda model: [p.data.mul_(0.9) for p in model.parameters()] and fastvit.refresh(model),
    "in place, recorded": torch.no_grad()(lambda model: [p.mul_(0.9) for p in model.parameters()]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_weights_that_change_are_seen(change, mode):
    model, fast = pair(mode=mode)
    with fastvit.use_backend("cpp"):
        before = run(fast, X)[0]
        for each in (model, fast):
            change(each)
        x = X.to(next(fast.parameters()).dtype)
        after, events = run(fast, x)
    assert not torch.equal(after.float(), before)
    assert not fallbacks(events)
    close(after.float(), run(model, x)[0].float(), factor=1.0 if x.dtype != torch.bfloat16 else 5e3)


def test_half_runs_as_the_model_does():
    model, fast = pair()
    close(run(fast.half(), X.half())[0].float(), run(model.half(), X.half())[0].float(), factor=500)


def test_a_hook_on_a_block_fires_and_nothing_changes(both):
    _, fast = both
    seen = []
    fast.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    _, events = run(fast, X)
    assert len(seen) == 1
    assert not fallbacks(events)


def _hooked(block, seen):
    block.mlp.fc1.register_forward_hook(lambda *_: seen.append(1)) if hasattr(block.mlp, "fc1") else None
    block.attn.proj.register_forward_pre_hook(lambda *_: seen.append(1))


class Lora(nn.Module):
    """A low-rank change beside a frozen layer (arXiv 2106.09685)."""

    def __init__(self, layer, seen):
        super().__init__()
        self.layer, self.seen = layer, seen
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        self.seen.append(1)
        return self.layer(x) + self.up(self.down(x))


def _lora(block, seen):
    block.attn.proj = Lora(block.attn.proj, seen)


def _pruned(block, seen):
    prune.l1_unstructured(block.attn.proj, "weight", amount=0.5)
    seen.append(1)


def _parametrized(block, seen):
    parametrizations.weight_norm(block.attn.proj)
    seen.append(1)


def _patched(block, seen):
    forward = block.attn.forward
    block.attn.forward = lambda *args, **kwargs: seen.append(1) or 2 * forward(*args, **kwargs)


class Scaled(torch.Tensor):
    """A weight of another type, which doubles what is linear in it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * 2 if func is nn.functional.linear else out


def _subclassed(block, seen):
    block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.detach().as_subclass(Scaled))
    seen.append(1)


INSIDE = {
    "hooks": (_hooked, "carries a hook"),
    "LoRA": (_lora, "Lora"),
    "pruning": (_pruned, "carries a hook"),
    "parametrization": (_parametrized, "Parametrized"),
    "patched forward": (_patched, "patched forward"),
    "weight of another type": (_subclassed, "Scaled as its weight"),
}


@pytest.mark.parametrize(("change", "reason"), INSIDE.values(), ids=INSIDE)
def test_what_is_inside_a_block_runs_and_explain_says_why(both, change, reason):
    model, fast = both
    torch.manual_seed(1)
    change(model.blocks[1], [])
    seen = []
    torch.manual_seed(1)
    change(fast.blocks[1], seen)
    before = len(seen)
    out, events = run(fast, X)
    torch.testing.assert_close(out, run(model, X)[0], rtol=2e-5, atol=2e-5)
    assert before or seen
    (why,) = fallbacks(events)
    assert reason in why
    rows = [row for row in fastvit.explain(fast).rows if row.module == "blocks.1"]
    assert [(row.op, row.backend, row.accelerated) for row in rows] == [("forward", "original", False)]
    assert reason in rows[0].reason
    assert fastvit.explain(fast, arch="sm_90").coverage.blocks == 0.5


def test_what_was_inside_and_is_gone_is_fused_again(both):
    _, fast = both
    handle = fast.blocks[0].norm1.register_forward_hook(lambda *_: None)
    assert fallbacks(run(fast, X)[1])
    handle.remove()
    assert not fallbacks(run(fast, X)[1])


def test_a_hook_in_the_embedding_fires():
    model, fast = pair()
    seen = []
    fast.patch_embed.proj.register_forward_hook(lambda *_: seen.append(1))
    out, events = run(fast, X)
    assert seen == [1]
    assert fallbacks(events) == ["proj carries a hook"]
    close(out, run(model, X)[0])
