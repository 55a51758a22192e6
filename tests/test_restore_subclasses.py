"""restore beneath what gives modules a class of their own: parametrizations, shards, a subclass of ours."""

import copy
import functools

import pytest
import torch
from accelerated import images, pair
from families import FAMILIES, close, family, is_the_librarys, outputs, same
from library_parity import named
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import fastvit
from fastvit.accelerate.registry import is_replaced


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def _own_parameters(model):
    """Every parameter that one of ours has itself."""
    replaced = [module for module in model.modules() if is_replaced(module)]
    return [(m, name) for m in replaced for name, p in m._parameters.items() if p is not None]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("deepcopied", [False, True])
def test_parametrizations_of_ours(name, deepcopied):
    model, call = family(name)
    fast = fastvit.accelerate(copy.deepcopy(model))
    found = _own_parameters(fast)
    names = {module: name for name, module in fast.named_modules()}
    for module, name in found:
        for each in (module, model.get_submodule(names[module])):
            parametrize.register_parametrization(each, name, Half())
    out = outputs(model, call)
    fast = copy.deepcopy(fast) if deepcopied else fast
    close(outputs(fast, call), out)
    assert fastvit.restore(fast) is fast
    assert is_the_librarys(fast)
    assert not any(map(is_replaced, fast.modules()))
    assert [type(m).__mro__[1:] for m in fast.modules()] == [type(m).__mro__[1:] for m in model.modules()]
    same(outputs(fast, call), out)
    for name, module in model.named_modules():
        for each in (module, fast.get_submodule(name)):
            if parametrize.is_parametrized(each):
                for parameter in list(each.parametrizations):
                    parametrize.remove_parametrizations(each, parameter)
        assert type(fast.get_submodule(name)) is type(module)
    same(outputs(fast, call), out)


def test_what_is_told_again_beneath_a_parametrization():
    model, fast = pair("eva", init_values=0.5)
    call = {"x": images()}
    for each in (model, fast):
        parametrize.register_parametrization(each.blocks[0], "gamma_1", Half())
    fastvit.accelerate(fast, mode="inference", strict=True)
    assert {block._fastvit.frozen for block in fast.blocks} == {True}
    close(outputs(fast, call), outputs(model, call))


NORMS = {
    "weight_norm by hooks": (functools.partial(old_weight_norm, dim=None), "", "gamma_1"),
    "weight_norm": (functools.partial(parametrizations.weight_norm, dim=0), "", "gamma_1"),
    "spectral_norm by hooks": (old_spectral_norm, "attn.proj", "weight"),
    "spectral_norm": (parametrizations.spectral_norm, "attn.proj", "weight"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(("norm", "layer", "parameter"), NORMS.values(), ids=NORMS)
def test_norms_of_weights(norm, layer, parameter):
    model, fast = pair("eva", init_values=0.5)
    call = {"x": images()}
    for each in (model, fast):
        torch.manual_seed(1)
        norm(each.blocks[0].get_submodule(layer), name=parameter)
        each.eval()
    out = outputs(model, call)
    close(outputs(fast, call), out)
    fastvit.restore(fast)
    assert is_the_librarys(fast)
    assert torch.equal(outputs(fast, call)["out"], out["out"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_shards_of_fsdp2(group, name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, call = family(name)
    mesh = init_device_mesh("cpu", (1,))
    fast = fastvit.accelerate(copy.deepcopy(model))
    ours = [name for name, module in fast.named_modules() if is_replaced(module)]
    for each in (model, fast):
        for name in reversed(ours):  # not the whole of open_clip's, whose scalar FSDP2 does not take
            fully_shard(each.get_submodule(name), mesh=mesh)
    out = outputs(model, call)
    close(outputs(fast, call), out)
    fastvit.restore(fast)
    assert is_the_librarys(fast)
    assert [type(m).__mro__[1:] for m in fast.modules()] == [type(m).__mro__[1:] for m in model.modules()]
    assert all(isinstance(fast.get_submodule(name), FSDPModule) for name in ours)
    same(outputs(fast, call), out)
    for each in (model, fast):
        torch.stack([value.square().mean() for _, value in named(each(**call))]).sum().backward()
    for (name, theirs), mine in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert torch.equal(whole(mine.grad), whole(theirs.grad)), name
    fresh = fastvit.accelerate(family("timm")[0])  # what FSDP remembers of ours is as it was
    fully_shard(fresh.blocks[0], mesh=mesh)
    assert is_replaced(fresh.blocks[0])


def test_one_that_somebody_has_written_is_named_before_anything_changes():
    class Mine(fastvit.TimmBlock):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    model, fast = pair()
    fast.blocks[1] = Mine(64, num_heads=2).eval()
    types_before, told = [type(module) for module in fast.modules()], dict(fast.blocks[0].__dict__)
    with pytest.raises(ValueError, match=r"restore has changed nothing: .*Mine is written as a subclass of"):
        fastvit.restore(fast)
    assert [type(module) for module in fast.modules()] == types_before
    assert fast.blocks[0].__dict__ == told
    fast.blocks[1] = model.blocks[1]
    assert is_the_librarys(fastvit.restore(fast))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["accelerated", "a subclass", "restored"])
def test_transformers_checkpoints_are_made_still(how):
    model, call = family("transformers")
    fastvit.accelerate(model).train()
    if how != "accelerated":
        for layer in model.encoder.layer:
            layer.own = nn.Parameter(torch.ones(1))
            parametrize.register_parametrization(layer, "own", Half())
    if how == "restored":
        fastvit.restore(model)
    model.gradient_checkpointing_enable()
    made = []
    for layer in model.encoder.layer:
        function = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, f=function, **k: made.append(1) or f(*a, **k)
    model(**call).last_hidden_state.sum().backward()
    assert len(made) == 2
