"""What accelerate is not for, each with one clear line, and the wrappers that it works in."""

import subprocess
import sys

import pytest
import timm
import torch
from accelerated import close, fallbacks, images, pair, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastvit

X = images()


def types(model):
    return [type(module) for module in model.modules()]


def test_no_vit_is_left_as_it_is_with_a_warning():
    model = timm.create_model("resnet18", num_classes=3)
    before = types(model)
    with pytest.warns(UserWarning, match="nothing in ResNet: it holds no block of a vision transformer"):
        assert fastvit.accelerate(model) is model
    assert types(model) == before
    with pytest.raises(ValueError, match="it holds no block of a vision transformer that fastvit knows"):
        fastvit.accelerate(model, strict=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_rpn_224", "its norms come behind attention and MLP"),
        ("vit_base_patch16_xp_224", "its attention and MLP are parallel"),
        ("vit_small_patch16_18x2_224", "its attentions are parallel"),
        ("swin_tiny_patch4_window7_224", "SwinTransformerBlock is of a kind that fastvit does not know"),
    ],
)
def test_blocks_that_are_left_alone_are_named(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = types(model)
    with pytest.raises(ValueError, match=reason):
        fastvit.accelerate(model, strict=True)
    assert types(model) == before


def test_a_subclass_of_a_known_block_is_left_alone():
    class Twice(timm.models.vision_transformer.Block):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    model, _ = pair()
    twice, fast = pair(block_fn=Twice)
    assert type(fast.blocks[0]) is Twice
    assert torch.equal(run(fast, X)[0], run(twice, X)[0])
    rows = fastvit.explain(fast).rows
    assert "Twice is a subclass of timm.models.vision_transformer.Block" in rows[-1].reason
    assert not torch.equal(run(twice, X)[0], run(model, X)[0])


def test_a_model_with_blocks_of_both_kinds():
    model, _ = pair()
    model.blocks[1] = timm.models.vision_transformer.ResPostBlock(64, num_heads=2, init_values=0.1).eval()
    out = run(model, X)[0]
    fast = fastvit.accelerate(model)
    again, events = run(fast, X)
    close(again, out)
    assert [e.op for e in events].count("layer_norm_mlp") == 1
    assert fastvit.explain(fast, arch="sm_90").coverage.blocks == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "eval"}, "mode is 'eval'; it must be one of train, inference"),
        ({"ops": ["softmax"]}, "unknown op 'softmax'; the ops are patch_embed, layer_norm_linear"),
    ],
)
def test_unknown_arguments(arguments, message):
    model, _ = pair()
    before = types(model)
    with pytest.raises(ValueError, match=message):
        fastvit.accelerate(model, **arguments)
    assert types(model) == before


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not dict"):
        fastvit.accelerate({})


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model():
    with pytest.raises(TypeError, match="cannot change a scripted model: accelerate first"):
        fastvit.accelerate(torch.jit.script(nn.Linear(2, 2)))


def test_on_the_meta_device_and_filled_later():
    model, _ = pair()
    with torch.device("meta"):
        empty = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=2,
            num_classes=7,
            init_values=0.1,
        ).eval()
    fast = fastvit.accelerate(empty)
    assert fast(X.to("meta")).shape == (3, 7)
    fast.load_state_dict(model.state_dict(), assign=True)
    out, events = run(fast, X)
    close(out, run(model, X)[0])
    assert not fallbacks(events)


def test_in_ddp_and_around_it(group):
    model, fast = pair()
    out = run(model, X)[0]
    for wrapped in (DistributedDataParallel(fast), fastvit.accelerate(DistributedDataParallel(model))):
        again, events = run(wrapped, X)
        close(again, out)
        assert not fallbacks(events)
        wrapped(X).sum().backward()
        assert all(p.grad is not None for p in wrapped.parameters())


def test_fsdp_after_accelerate_and_not_before(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, fast = pair()
    out = run(model, X)[0]
    mesh = init_device_mesh("cpu", (1,))
    for each in (model, fast):
        for block in each.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(each, mesh=mesh)
    with pytest.raises(ValueError, match="is sharded by FSDP: accelerate the model first, then shard it"):
        fastvit.accelerate(model)
    again, events = run(fast, X)
    close(again, out)
    assert not fallbacks(events)
    fast(X).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


def test_an_image_of_the_wrong_size_is_the_models_own_error():
    model, fast = pair()
    for each in (model, fast):
        with pytest.raises(AssertionError, match="Input height"):
            each(images(size=40))


def test_importing_fastvit_imports_no_other_library():
    others = "'timm', 'transformers', 'torchvision', 'open_clip'"
    code = f"import sys, fastvit; print([m for m in ({others}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_normalisation_is_folded_in_and_taken_back():
    model, fast = pair()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    columns = (torch.tensor(values)[:, None, None] for values in (mean, std))
    unit = pixels / 255
    out = run(model, (unit - next(columns)) / next(columns))[0]
    assert fastvit.fold_normalize(fast, mean, std) is fast
    for given in (pixels, unit):
        close(run(fast, given)[0], out)
    fastvit.accelerate(fast, mode="inference")
    close(run(fast, pixels)[0], out)
    fast.patch_embed.proj.register_forward_hook(lambda *_: None)
    close(run(fast, pixels)[0], out)
    fastvit.restore(fast)
    assert torch.equal(run(fast, X)[0], run(model, X)[0])


def test_normalisation_where_it_cannot_be():
    model, fast = pair()
    with pytest.raises(
        ValueError, match="no patch embedding of VisionTransformer can normalise: accelerate it first"
    ):
        fastvit.fold_normalize(model, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="mean has 1 values and std 3; the model's images have 3 channels"):
        fastvit.fold_normalize(fast, (0.5,), (0.5,) * 3)
