"""What swaps tensors in place: torch.utils.swap_tensors, and conversions and loads that go by it."""

import copy

import pytest
import torch
from accelerated import images, pair
from families import FAMILIES, close, family, outputs
from torch import nn

import fastvit

BLOCK_OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")


@pytest.fixture
def swapping():
    """Modules swap their parameters where they are converted and loaded."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def _swapped(model):
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 0.5))


def _double(model):
    model.double()


def _loaded(model):
    model.load_state_dict(
        {name: 0.5 * t if t.is_floating_point() else t for name, t in model.state_dict().items()}
    )


CHANGES = {"swap_tensors": _swapped, "double": _double, "load_state_dict": _loaded}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_swapped_after_a_forward(name, mode, change, swapping):
    model, call = family(name)
    fast, restored = (fastvit.accelerate(copy.deepcopy(model), mode=mode) for _ in range(2))
    with fastvit.use_backend(**dict.fromkeys(BLOCK_OPS, "cpp")):
        before = outputs(fast, call)
        close(outputs(restored, call), before)
        close(before, outputs(model, call))
        fastvit.restore(restored)
        for each in (model, fast, restored):
            change(each)
        after = outputs(model, call)
        assert any(not torch.equal(value, before[name]) for name, value in after.items())
        close(outputs(fast, call), after)
    close(outputs(restored, call), after)


def test_swapped_after_a_graph_was_captured(swapping):
    model, fast = pair("vit", depth=1)
    runner, x = fastvit.graphed(fast, batch_sizes=[3]), images()
    with torch.no_grad():
        runner(x)
        assert "replayed" in runner.explain()
        for each in (model, fast):
            _swapped(each)
        torch.testing.assert_close(runner(x), model(x), rtol=2e-5, atol=1e-4)
