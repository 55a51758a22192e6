"""What stands for a model follows its weights too: graphs, traced and exported modules, weights in a call."""

import copy
import warnings

import pytest
import torch
from native_calls import needs_library
from sequences import Alone
from tiny_twins import assert_close, assert_same_weights, images, moved, output, pair, served_by
from torch.func import functional_call
from weight_writers import BROAD, NARROW, WRITERS
from writing import delta, edited, other_state

import fastvit

X = images()
MODES = ("train", "inference")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    with served_by(request.param):
        yield request.param


def computes(model, x=X):
    with torch.no_grad():
        return output(model, x)


# Those that yield the model itself, of which a runner is.
REPLAYED = {
    mode: [name for name in (BROAD, WRITERS)[mode == "train"] if name != "AveragedModel"] for mode in MODES
}


@needs_library()
@pytest.mark.parametrize(
    ("family", "mode", "writer"),
    [("timm", mode, name) for mode in MODES for name in REPLAYED[mode]]
    + [("timm, q, k, v apart", "train", name) for name in ("LoRA merged", "another process", *NARROW)]
    + [("hf vit", mode, name) for mode in MODES for name in ("in place", "LoRA merged", "torch_ema")],
)
def test_a_runner_replays_with_what_was_written(family, mode, writer, backend):
    ours, twin = pair(family, mode)
    runner, compared = fastvit.graphed(ours, (2,)), 0

    @torch.no_grad()
    def replayed():
        out = runner(X.to(next(ours.parameters()).dtype))
        return out if isinstance(out, torch.Tensor) else out[0]

    for _ in range(2):
        assert_close(replayed(), computes(twin))
    for fast, plain in zip(WRITERS[writer](ours), WRITERS[writer](twin), strict=True):
        assert_same_weights(fast, plain)
        if fast is ours:
            compared += 1
            assert_close(replayed(), computes(plain))
    assert compared


TRACED = (
    "hf vit",
    "hf dinov2",
    "hf clip",
    "timm",
    "timm, q and v biases",
    "timm, q, k, v apart",
    "torchvision",
)


def traced(model):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Alone(model), X, check_trace=False)


@needs_library()
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TRACED)
def test_a_traced_module_follows_what_it_loads_and_what_is_written(family, mode, warm, backend):
    ours, twin = pair(family, mode)
    if warm:
        computes(ours)
    both = traced(ours), traced(twin)
    before = both[1](X)
    assert_close(both[0](X), before)
    state = other_state(both[1])
    for each in both:
        each.load_state_dict(state)
    assert moved(before, both[1](X)) > 0.01
    with torch.no_grad():
        assert_close(both[0](X), both[1](X))
        for model in (ours, twin):
            edited(model)
        assert_close(both[0](X), both[1](X))
        assert_close(both[0](X), output(twin, X))


EXPORTED = ("timm", "timm, q and v biases", "timm, q, k, v apart", "hf vit")


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", EXPORTED)
def test_an_exported_program_computes_with_the_weights_that_it_is_given(family, mode, backend):
    ours, twin = pair(family, mode)
    computes(ours)
    with torch.no_grad():
        program = torch.export.export(Alone(ours), (X,)).module()
        assert_close(program(X), output(twin, X))
        state = other_state(twin)
        twin.load_state_dict(state)
        given = {f"model.{name}": value for name, value in state.items()}
        assert_close(functional_call(program, given, (X,)), output(twin, X))
        program.load_state_dict(given)
        assert_close(program(X), output(twin, X))
        for model in (program, twin):
            for name, p in model.named_parameters():
                p.data.add_(delta(name.removeprefix("model."), p))
        assert_close(program(X), output(twin, X))


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*EXPORTED, "hf dinov2", "torchvision", "own"])
def test_weights_that_are_given_at_a_call_serve_that_call(family, mode, backend):
    ours, twin = pair(family, mode)
    expected = [computes(twin)]
    for _ in range(2):
        edited(twin)
        expected.append(computes(twin))
    given, other = copy.deepcopy(ours), {name: p.detach().clone() for name, p in ours.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            assert_close(output(ours, X), expected[0])
            assert_close(functional_call(Alone(given), prefixed(other), (X,)), expected[0])
    for out in expected[1:]:
        for name, tensor in other.items():
            tensor.data.add_(delta(name, tensor))
        with torch.no_grad():
            assert_close(functional_call(Alone(given), prefixed(other), (X,)), out)
            assert_close(output(given, X), expected[0])
            assert_close(output(ours, X), expected[0])


def prefixed(state):
    return {f"model.{name}": value for name, value in state.items()}
