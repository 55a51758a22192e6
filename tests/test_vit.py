"""VisionTransformer has timm's constructor, attributes and methods, and they do what timm's do."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as Timm
from timm_twins import twins

import fastvit
from fastvit import VisionTransformer
from fastvit.verification import randomize

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def pair(seed: int = 0, **arguments) -> tuple[VisionTransformer, Timm]:
    """Both classes with the same arguments and random weights."""
    ours, theirs = VisionTransformer(**TINY | arguments), Timm(**TINY | arguments)
    ours.load_state_dict(randomize(theirs, seed).state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_it_is_our_own_class():
    homes = {base.__module__.split(".")[0] for base in VisionTransformer.__mro__}
    assert homes == {"fastvit", "torch", "builtins"}
    package = Path(fastvit.__file__).parent
    sources = (path for path in package.rglob("*.py") if path.parent.name != "accelerate")
    importing = {
        path.name for path in sources if re.search(r"^\s*(import|from) timm", path.read_text(), re.M)
    }
    # Where timm is what fastvit is compared with, imported where it is used.
    assert importing == {"commands.py", "model_names.py", "run.py"}


def test_constructor_takes_timms_arguments_with_timms_defaults():
    ours = inspect.signature(VisionTransformer.__init__).parameters
    for name, theirs in inspect.signature(Timm.__init__).parameters.items():
        if isinstance(theirs.default, (int, float, str, bool, type(None))):
            assert ours[name].default == theirs.default, name
        else:
            assert name in ours


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
        {"global_pool": "map", "class_token": False},
        {"weight_init": "moco", "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"weight_init": "jax_nlhb", "global_pool": "avg"},
        {"weight_init": "reset", "pre_norm": True, "norm_layer": "rmsnorm"},
        {"fix_init": True, "drop_path_rate": 0.2, "mlp_layer": timm.layers.SwiGLUPacked},
    ],
)
def test_same_seed_draws_the_same_weights(arguments):
    torch.manual_seed(0)
    ours = VisionTransformer(**TINY | arguments).state_dict()
    torch.manual_seed(0)
    theirs = Timm(**TINY | arguments).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7, msg=name)


ATTRIBUTES = [
    "num_classes",
    "in_chans",
    "global_pool",
    "num_features",
    "head_hidden_size",
    "embed_dim",
    "num_prefix_tokens",
    "num_reg_tokens",
    "has_class_token",
    "no_embed_class",
    "pool_include_prefix",
    "dynamic_img_size",
    "grad_checkpointing",
    "feature_info",
]


def test_attributes_are_timms():
    ours, theirs = pair(reg_tokens=2, drop_path_rate=0.1, drop_rate=0.1)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.patch_embed.num_patches == theirs.patch_embed.num_patches
    assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
    assert ours.patch_embed.feat_ratio() == theirs.patch_embed.feat_ratio()
    assert [b.attn.num_heads for b in ours.blocks] == [b.attn.num_heads for b in theirs.blocks]
    assert [type(m).__name__ for m in ours.children()] == [type(m).__name__ for m in theirs.children()]
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.get_classifier() is ours.head


# One value of each option; what options do together is the business of test_timm_architectures.py.
OPTIONS = [
    {"qk_norm": True},
    {"qk_norm": True, "norm_layer": "rmsnorm"},
    {"qkv_bias": False, "proj_bias": False},
    {"scale_attn_norm": True, "scale_mlp_norm": True},
    {"init_values": 0.1},
    {"class_token": False, "global_pool": "avg"},
    {"pos_embed": "none"},
    {"pre_norm": True},
    {"final_norm": False},
    {"fc_norm": True},
    {"act_layer": "quick_gelu"},
    {"act_layer": "gelu_tanh"},
    {"act_layer": "relu"},
    {"act_layer": torch.nn.Hardswish},
    {"mlp_layer": timm.layers.SwiGLU, "act_layer": "silu"},
    {"norm_layer": timm.layers.LayerNormFp32},
    {"embed_norm_layer": "layernorm"},
    {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    {"in_chans": 1},
    {"patch_size": (8, 16)},
    {"num_classes": 0},
]


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_options_hold_the_contract_forward_and_backward(arguments):
    ours, theirs = pair(**arguments)
    x = torch.randn(2, arguments.get("in_chans", 3), 32, 32)
    fastvit.verify(ours, x, oracle=theirs, backward=True).raise_if_failed()


# Dropout of every kind draws the same numbers from the same seed, so the outputs agree too.
@pytest.mark.parametrize(
    "rate", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "drop_path_rate"]
)
def test_dropout_in_training(rate):
    ours, theirs = pair(**{rate: 0.5})
    x = images(8)
    torch.manual_seed(0)
    out = ours.train()(x)
    torch.manual_seed(0)
    expected = theirs.train()(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, ours.eval()(x))


def test_attention_dropout_in_training():
    ours, _ = pair(attn_drop_rate=0.5)
    assert not torch.allclose(ours.train()(images()), ours.eval()(images()))


def test_masks_and_causality():
    ours, theirs = pair()
    x, mask = images(), torch.rand(17, 17) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"stop_early": True}, {"output_fmt": "NLC"}], ids=str
)
@pytest.mark.parametrize("indices", [None, 2, [0, -1]])
@pytest.mark.parametrize(
    "form", [{}, {"return_prefix_tokens": True}, {"intermediates_only": True}, {"output_dict": True}]
)
def test_forward_intermediates(indices, options, form):
    ours, theirs = pair(reg_tokens=2, global_pool="avg")
    out = ours.forward_intermediates(images(), indices, **options, **form)
    expected = theirs.forward_intermediates(images(), indices, **options, **form)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_get_intermediate_layers():
    ours, theirs = pair()
    for arguments in ({"n": 2}, {"n": [0, 2], "reshape": True, "norm": True, "return_prefix_tokens": True}):
        out, expected = (list(m.get_intermediate_layers(images(), **arguments)) for m in (ours, theirs))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_intermediates_that_do_not_exist():
    ours, _ = pair()
    with pytest.raises(ValueError, match="the last 4 blocks were asked for; the model has 3"):
        ours.forward_intermediates(images(), 4)
    with pytest.raises(ValueError, match="block 3 was asked for; the model has blocks 0 to 2"):
        ours.forward_intermediates(images(), [3])
    with pytest.raises(ValueError, match="output_fmt"):
        ours.forward_intermediates(images(), output_fmt="NHWC")


def test_prune_intermediate_layers():
    ours, theirs = pair()
    assert ours.prune_intermediate_layers([1], prune_norm=True) == theirs.prune_intermediate_layers(
        [1], prune_norm=True
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


def test_reset_classifier():
    ours, theirs = pair(global_pool="map")
    for classes, pool in [(3, "avg"), (0, None), (4, "token")]:
        ours.reset_classifier(classes, pool)
        theirs.reset_classifier(classes, pool)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="can't be added later"):
        ours.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="global_pool is 'mean'"):
        ours.reset_classifier(3, "mean")


def test_set_input_size():
    ours, theirs = pair(reg_tokens=1)
    ours.pos_embed.requires_grad_(False)
    for arguments in ({"img_size": (40, 24)}, {"patch_size": 4}, {"img_size": 48, "patch_size": 6}):
        ours.set_input_size(**arguments)
        theirs.set_input_size(**arguments)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
        x = torch.randn(1, 3, *ours.patch_embed.img_size)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not ours.pos_embed.requires_grad


def test_grad_checkpointing_gives_the_same_gradients():
    ours, _ = pair(drop_path_rate=0.3)
    grads = []
    for enable in (False, True):
        ours.train().set_grad_checkpointing(enable)
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(ours(images()).square().sum(), list(ours.parameters())))
    torch.testing.assert_close(grads[1], grads[0])


def test_an_empty_batch():
    ours, _ = pair()
    out = ours(images(0))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_copies_and_pickles():
    ours, _ = pair(init_values=0.1, drop_path_rate=0.1)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(images()), ours(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    ours, theirs = pair(init_values=0.1)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    fastvit.verify(ours, images().to(dtype), oracle=theirs).raise_if_failed()


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1, "qk_norm": True}, {"norm_layer": "rmsnorm"}])
def test_autocast_yields_timms_dtypes(arguments):
    ours, theirs = pair(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = [m.forward_features(images()) for m in (ours, theirs)]
        logits = [m(images()) for m in (ours, theirs)]
    assert out[0].dtype == out[1].dtype
    assert logits[0].dtype == logits[1].dtype == torch.bfloat16
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


def test_uint8_images_are_divided_by_255():
    ours, _ = pair()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(ours(x), ours(x.float() / 255))


def test_channels_last_images():
    ours, _ = pair()
    x = images()
    torch.testing.assert_close(ours(x.to(memory_format=torch.channels_last)), ours(x), rtol=1e-5, atol=1e-5)


def test_full_size_model_end_to_end():
    """One model as it is used: 12 blocks, 1000 classes, backward."""
    ours, theirs = twins("vit_tiny_patch16_224")
    fastvit.verify(ours, torch.randn(1, 3, 224, 224), oracle=theirs, backward=True).raise_if_failed()
