"""What a forward chose holds for its recomputation in backward: `use_backend`, and `accelerate`'s ops."""

from contextlib import nullcontext

import pytest
import timm
import torch
from accelerated import SMALL, images
from native_calls import needs_library
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import recording, use_backend

pytestmark = needs_library()
HALVES = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
BY = {name: dict.fromkeys(HALVES, name) for name in ("cpp", "reference")}


def timms(**options):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, init_values=0.1)
    return fastvit.accelerate(model.train(), **options)


def of_timm(**options):
    model = timms(**options)
    model.set_grad_checkpointing()
    return model


def of_eva(**options):
    model = timm.create_model("eva02_tiny_patch14_224", **SMALL).train()
    model.set_grad_checkpointing()
    return fastvit.accelerate(model, **options)


def of_our_own(**options):
    own = fastvit.VisionTransformer(**SMALL).train()
    own.grad_checkpointing = True
    return fastvit.accelerate(own, **options)


def of_mlps(**options):
    return timms(checkpoint="mlp", **options)


def of_our_own_mlps(**options):
    return fastvit.accelerate(fastvit.VisionTransformer(**SMALL).train(), checkpoint="mlp", **options)


def of_transformers(use_reentrant, **options):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=8)
    model = transformers.ViTModel(config, add_pooling_layer=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fastvit.accelerate(model, **options)
    return lambda x: model(x.requires_grad_()).last_hidden_state


def of_everything(use_reentrant, **options):
    model = timms(**options)
    return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)


def nested(outer, inner, **options):
    model = timms(**options)

    def blocks(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=inner)
        return x

    return lambda x: checkpoint(blocks, model.patch_embed.proj(x).flatten(2).mT, use_reentrant=outer)


CHECKPOINTS = {
    "mlp": of_mlps,
    "mlp, fastvit's": of_our_own_mlps,
    "fastvit": of_our_own,
    "timm": of_timm,
    "eva": of_eva,
    **{f"transformers, {r}": lambda r=r, **o: of_transformers(r, **o) for r in (True, False)},
    **{f"everything, {r}": lambda r=r, **o: of_everything(r, **o) for r in (True, False)},
    **{
        f"nested, {a}, {b}": lambda a=a, b=b, **o: nested(a, b, **o)
        for a in (True, False)
        for b in (True, False)
    },
}


def ran(function, *context):
    """What it gives, and which ops ran by which backend."""
    with recording.recording() as recorder:
        out = function()
    return out, {(event.op, event.backend) for event in recorder.events if event.op in HALVES}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_backend_of_a_forward_is_that_of_its_recomputation(kind):
    model = CHECKPOINTS[kind]()
    with use_backend(**BY["cpp"]):
        first, forward = ran(lambda: model(images()))
    with use_backend("reference"):  # between them, and on another graph
        second, other = ran(lambda: model(images(batch=2)))
    third, automatic = ran(lambda: model(images()))
    assert {backend for _, backend in forward} == {"cpp"}
    assert {backend for _, backend in other | automatic} == {"reference"}
    for out, chosen, around in (
        (second, other, use_backend(**BY["cpp"])),
        (first, forward, nullcontext()),
        (third, automatic, use_backend(**BY["cpp"])),
    ):
        with around:
            _, again = ran(out.sum().backward)
        assert again
        assert again <= chosen


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_ops_of_accelerate_hold_too(kind):
    model = CHECKPOINTS[kind](ops=["layer_norm_mlp", "layer_norm_linear"])
    with use_backend(**BY["cpp"]):
        out, forward = ran(lambda: model(images()))
    assert {backend for op, backend in forward if op == "linear_residual"} <= {"reference"}
    assert {backend for op, backend in forward if op == "layer_norm_mlp"} == {"cpp"}
    assert ran(out.sum().backward)[1] <= forward


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_entered_inside_of_a_region_is_entered_again(use_reentrant):
    block = timms().blocks[0]

    def region(x):
        with use_backend(layer_norm_mlp="reference"):
            x = block(x)
        return block(x).sin()

    x = torch.randn(2, 5, 64, requires_grad=True)
    for outside in (nullcontext(), use_backend(**BY["cpp"])):
        with outside:
            out, _ = ran(lambda: checkpoint(region, x, use_reentrant=use_reentrant))
            with recording.recording() as recorder:
                region(x)
        expected = [event.backend for event in recorder.events if event.op in HALVES]
        with use_backend("cpp"), recording.recording() as recorder:
            out.sum().backward()
        assert [event.backend for event in recorder.events if event.op in HALVES] == expected
    assert "cpp" in expected


def test_a_graph_that_is_kept_recomputes_alike_every_time():
    model = of_timm()
    with use_backend(**BY["cpp"]):
        out, forward = ran(lambda: model(images()))
    for _ in range(2):
        assert ran(lambda: out.sum().backward(retain_graph=True))[1] <= forward


def test_a_forward_inside_of_backward_is_its_own():
    """A hook that runs a model is no recomputation."""
    model, seen = timms(), []

    def hook(_):
        with use_backend(**BY["cpp"]):
            seen.append(ran(lambda: model(images()))[1])

    out = model(images())
    out.register_hook(hook)
    out.sum().backward()
    assert {backend for _, backend in seen[0]} == {"cpp"}


@pytest.mark.parametrize("own", [True, False], ids=["fastvit", "timm"])
def test_a_checkpointed_mlp_inside_of_a_transform_is_computed_without(own):
    model = (of_our_own_mlps if own else of_mlps)().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (images(),)).square().mean()

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_fastvits_checkpointed_blocks_inside_of_a_transform():
    model = of_our_own().eval()
    gradient = torch.func.grad(lambda x: model(x).square().mean())(images())
    x = images().requires_grad_()
    model(x).square().mean().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-6)
