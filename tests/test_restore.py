"""restore beneath hooks and wrappers that hold a module's forward, whoever put them there and when."""

import copy
import functools
import types
import weakref

import pytest
import torch
from accelerated import images, pair
from families import FAMILIES, close, family, is_the_librarys, outputs, same

import fastvit
from fastvit import derived


def add_hook(module):
    """What Accelerate's add_hook_to_module does: the module holds its old forward, and a new one calls it."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    new = functools.partial(new_forward, module)
    module.forward = functools.update_wrapper(new, module._old_forward)


def remove_hook(module):
    """What Accelerate's remove_hook_from_module does."""
    module.forward = module._old_forward
    del module._old_forward


def _closure(module):
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def _method(module):
    """As Accelerator.prepare does it for mixed precision."""
    function = module.forward.__func__
    module.forward = types.MethodType(lambda self, *args, **kwargs: function(self, *args, **kwargs), module)


def _partial(module):
    module.forward = functools.partial(module.forward)


def _another_name(module):
    module.run = module.forward
    module.forward = lambda *args, **kwargs: module.run(*args, **kwargs)


def _kept(module):
    module.forward = module.forward  # as transformers 4 leaves it there


def _twice(module):
    _closure(module)
    add_hook(module)


WRAPPERS = {
    "Accelerate's hook": add_hook,
    "closure": _closure,
    "method": _method,
    "partial": _partial,
    "kept by another name": _another_name,
    "kept": _kept,
    "twice": _twice,
}


def wrapped(model, wrap):
    for module in model.modules():
        wrap(module)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_forward_that_somebody_holds(name, wrap):
    model, call = family(name)
    out = outputs(model, call)
    for fast in (
        wrapped(fastvit.accelerate(copy.deepcopy(model)), wrap),
        fastvit.accelerate(wrapped(copy.deepcopy(model), wrap)),
    ):
        close(outputs(fast, call), out)
        assert not is_the_librarys(fast)
        fastvit.restore(fast)
        assert is_the_librarys(fast)
        same(outputs(fast, call), out)
        close(outputs(fastvit.accelerate(fast), call), out)


@pytest.mark.parametrize("name", FAMILIES)
def test_accelerates_hooks_are_removed_after_restore(name):
    model, call = family(name)
    types_before = [type(module) for module in model.modules()]
    out = outputs(model, call)
    fast = fastvit.restore(wrapped(fastvit.accelerate(model), add_hook))
    held = [module._old_forward for module in fast.modules()]
    assert not any(forward.__func__.__module__.startswith("fastvit") for forward in held)
    for module in fast.modules():
        remove_hook(module)
    assert [type(module) for module in fast.modules()] == types_before
    same(outputs(fast, call), out)


def test_a_hook_that_was_there_first_calls_ours():
    model, call = family("timm")
    for block in model.blocks:
        add_hook(block)
    fastvit.accelerate(model)
    with torch.no_grad(), fastvit.recording.recording() as recorder:
        model(**call)
    assert [event.op for event in recorder.events].count("layer_norm_mlp") == 2


def test_other_methods_that_somebody_holds():
    model, call = family("timm")
    tokens, out = model.forward_features(call["x"]), outputs(model, call)
    fast = fastvit.accelerate(model)
    features, block = fast.forward_features, fast.blocks[0].forward
    fast.forward = fast.forward_features
    fastvit.restore(fast)
    assert torch.equal(features(call["x"]), tokens)
    assert torch.equal(fast(call["x"]), tokens)
    del fast.forward
    assert torch.equal(outputs(fast, call)["out"], out["out"])
    x = torch.randn(2, 17, 64)
    assert torch.equal(block(x), fast.blocks[0](x))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_modules(how, monkeypatch):
    model, fast = pair(depth=1)
    x, ours = images(), type(fast.blocks[0])
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager") if how == "wrapped" else fast
        if how == "in place":
            fast.blocks[0].compile(backend="eager")
        out = model(x)
        torch.testing.assert_close(compiled(x), out, rtol=2e-5, atol=2e-5)
        fastvit.restore(compiled)
        assert is_the_librarys(fast)
        monkeypatch.setattr(ours, "gather", None)
        assert torch.equal(compiled(x), out)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_weights_go(name):
    derived.refresh()
    ops = dict.fromkeys(("layer_norm_linear", "linear_residual", "layer_norm_mlp"), "cpp")
    (fast, call), (other, _) = family(name), family(name)
    with fastvit.use_backend(**ops):
        outputs(fastvit.accelerate(other, mode="inference"), call)
        others = derived.everything()
        outputs(fastvit.accelerate(fast, mode="inference"), call)
    its = {weakref.ref(copy) for copy in derived.everything() if copy not in others}
    assert its
    fastvit.restore(fast)
    assert len(derived.everything()) == len(others)
    assert not any(ref() is not None for ref in its)
    del others
    fastvit.restore(other)
    assert derived.everything() == []
