"""torch.compile, torch.export and torch.fx take the whole model: one graph, any batch, all modules."""

import pytest
import torch
from torch.fx import symbolic_trace

import fastvit
from fastvit import VisionTransformer
from fastvit.verification import randomize

ARGUMENTS = [
    {},
    {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2, "no_embed_class": True},
    {"global_pool": "map", "class_token": False, "norm_layer": "rmsnorm"},
    {"dynamic_img_size": True, "dynamic_img_pad": True},
]


def model(**arguments) -> VisionTransformer:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return randomize(VisionTransformer(**tiny | arguments)).eval()


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_compile_is_one_graph_forward_and_backward(arguments):
    torch._dynamo.reset()
    vit, x = model(**arguments), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), vit(x))
    grads = [torch.autograd.grad(f(x).square().sum(), list(vit.parameters())) for f in (compiled, vit)]
    torch.testing.assert_close(*grads)


def test_compile_in_training_with_stochastic_depth():
    torch._dynamo.reset()
    compiled = torch.compile(model(drop_path_rate=0.5).train(), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3, 32, 32)).sum().backward()


def test_compile_does_not_recompile_over_a_batch_sweep():
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(2, 3, 32, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 8, 64):
            assert compiled(torch.randn(batch, 3, 32, 32)).shape == (batch, 5)


@pytest.mark.parametrize("train", [False, True])
def test_compile_of_dynamic_image_sizes(train):
    torch._dynamo.reset()
    vit = model(dynamic_img_size=True)
    compiled = torch.compile(vit, backend="aot_eager")
    for height, width in [(32, 32), (64, 64), (48, 40)]:
        x = torch.randn(2, 3, height, width)
        with torch.set_grad_enabled(train):
            out = compiled(x)
        torch.testing.assert_close(out, vit(x))
        if train:
            out.sum().backward()


def test_export_with_dynamic_image_sizes():
    vit, auto = model(dynamic_img_size=True), torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto}, None, None)
    program = torch.export.export(vit, (torch.randn(2, 3, 32, 32), None, False), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 64, 48)
    torch.testing.assert_close(program.module()(x, None, False), vit(x))


def test_compile_follows_use_backend():
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32, 32)
    expected = compiled(x)
    with fastvit.use_backend("reference"):
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_export_with_a_dynamic_batch(arguments):
    vit, x = model(**arguments), torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(vit, (x,), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), vit(x))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_fx_sees_every_module(arguments):
    """What quantises or prunes by torch.fx looks for modules."""
    vit, x = model(**arguments), torch.randn(2, 3, 32, 32)
    traced = symbolic_trace(vit)
    torch.testing.assert_close(traced(x), vit(x))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GELU)
    assert called >= {name for name, module in vit.named_modules() if isinstance(module, layers)}


def test_fx_graph_is_retraceable_and_pickles(tmp_path):
    vit, x = model(), torch.randn(1, 3, 32, 32)
    traced = symbolic_trace(symbolic_trace(vit))
    torch.save(traced, tmp_path / "traced.pt")
    loaded = torch.load(tmp_path / "traced.pt", weights_only=False)  # our own file
    torch.testing.assert_close(loaded(x), vit(x))
