"""torch.fx, torch.export and torch.compile see accelerated models as they see the originals."""

import pytest
import torch
from accelerated import close, images, pair, run
from timm.models._features_fx import FeatureGraphNet

import fastvit

X = images(batch=4)  # not of as many as an image has channels: a compiler takes equal sizes for one


@pytest.fixture(params=["vit", "eva"])
def both(request):
    return pair(request.param)


def _targets(graph):
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]


def test_fx_sees_the_modules_of_the_original():
    model, fast = pair()
    traced, original = torch.fx.symbolic_trace(fast), torch.fx.symbolic_trace(model)
    assert _targets(traced.graph) == _targets(original.graph)
    assert torch.equal(traced(X), model(X))


def test_timms_features_by_fx():
    model, fast = pair()
    features = [FeatureGraphNet(each, (1,), return_dict=False) for each in (model, fast)]
    for a, b in zip(features[1](X), features[0](X), strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_export_with_a_dynamic_batch(both, backend):
    model, fast = both
    with fastvit.use_backend(backend), torch.no_grad():
        program = torch.export.export(fast, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (2, 5):
            x = images(batch)
            close(program.module()(x), run(model, x)[0])
    if backend == "cpp":
        targets = " ".join(_targets(program.graph))
        assert targets.count("layer_norm_mlp_fwd") == 2


def test_other_models_calls_compile_nothing_anew(both):
    torch._dynamo.reset()
    fast, other = both[1], pair()[1]
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        compiled(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for backend in ("cpp", "reference", "auto"):
                with fastvit.use_backend(backend):
                    other(X)
                compiled(X)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_compile_is_one_graph_for_all_batches(both, backend, mode):
    torch._dynamo.reset()
    model, fast = both
    fastvit.accelerate(fast, mode=mode)
    with fastvit.use_backend(backend), torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
        close(compiled(X), run(model, X)[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 5, 8):
                close(compiled(images(batch)), run(model, images(batch))[0])


def test_compile_of_a_training_step(both):
    model, fast = both
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with fastvit.use_backend("cpp"):
        compiled(X).square().sum().backward()
    model(X).square().sum().backward()
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max() + 1e-3))


def test_compile_with_a_hook_inside_runs_the_hook():
    model, fast = pair()
    for each in (model, fast):
        each.blocks[0].mlp.act.register_forward_hook(lambda module, args, out: out * 2)
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        close(compiled(X), model(X))


def test_a_program_that_was_exported_before_keeps_its_weights(tmp_path):
    _, fast = pair()
    with torch.no_grad():
        program = torch.export.export(fast, (X,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(X), program.module()(X))
        close(loaded(X), fast(X))
