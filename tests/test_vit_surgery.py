"""What people do to a ViT they have: change its convolution, wrap its blocks, override its positions."""

import pytest
import timm
import torch
from test_vit import images, pair
from torch import nn

import fastvit
from fastvit import VisionTransformer


def same_edit(edit, **arguments):
    """Both models after the same edit."""
    ours, theirs = pair(**arguments)
    for model in (ours, theirs):
        edit(model)
    return ours, theirs


# The dense-feature trick of DINO, and its relatives: the patches overlap, or are otherwise more than a cut.
@pytest.mark.parametrize(
    "changes", [{"stride": (4, 4)}, {"padding": (4, 4)}, {"dilation": (2, 2), "stride": (2, 2)}], ids=str
)
def test_a_changed_patch_convolution(changes):
    def edit(model):
        for name, value in changes.items():
            setattr(model.patch_embed.proj, name, value)

    ours, theirs = same_edit(edit, pos_embed="none")
    out, expected = ours.forward_features(images()), theirs.forward_features(images())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_one_channel_patch_weight():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.patch_embed.proj.weight = nn.Parameter(model.patch_embed.proj.weight.sum(1, keepdim=True))
    x = images()[:, :1]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_blocks_are_called_as_one():
    ours, _ = pair()
    expected, fired = ours(images()), []
    ours.blocks.register_forward_hook(lambda *args: fired.append(None))
    torch.testing.assert_close(ours(images()), expected)
    assert fired


def test_compiled_blocks():
    torch._dynamo.reset()
    ours, _ = pair()
    expected = ours(images())
    ours.blocks = torch.compile(ours.blocks, backend="aot_eager")
    torch.testing.assert_close(ours(images()), expected)


@pytest.mark.parametrize("how", ["instance", "subclass"])
def test_positions_of_ones_own(how):
    ours, _ = pair()
    if how == "instance":
        ours._pos_embed = lambda tokens: tokens * 0
    else:

        class Own(VisionTransformer):
            def _pos_embed(self, x):
                return x * 0

        ours.__class__ = Own
    assert not ours._embed(images()).any()


def test_positions_of_the_wrong_form_are_refused():
    ours, _ = pair()
    ours.pos_embed = nn.Parameter(ours.pos_embed[:, 1:])
    with pytest.raises(ValueError, match="pos_embed has 16 rows; this model has 17 positions"):
        ours(images())


def test_an_embedding_layer_that_knows_only_its_number_of_patches():
    class Mean(nn.Module):
        num_patches = 4

        def __init__(self, embed_dim, **kwargs):
            super().__init__()
            self.linear = nn.Linear(3, embed_dim)

        def forward(self, x):
            return self.linear(x.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5)).flatten(2).mT)

    ours, theirs = pair(embed_layer=Mean)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


def test_attention_layers_that_ask_for_their_depth():
    ours, theirs = pair(attn_layer=timm.layers.DiffAttention, num_heads=2)
    assert [b.attn.lambda_init for b in ours.blocks] == [b.attn.lambda_init for b in theirs.blocks]
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


def test_uint8_images_with_a_hook_on_the_embedding():
    ours, _ = pair()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = ours(x)
    ours.patch_embed.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(ours(x), expected)


def test_a_float32_mask_in_a_half_precision_model():
    ours, theirs = pair()
    mask = torch.randn(17, 17)
    out, expected = (m.bfloat16()(images().bfloat16(), attn_mask=mask) for m in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_no_dropout_after_positions_that_are_not_there():
    ours, theirs = pair(pos_embed="none", pos_drop_rate=0.5)
    torch.testing.assert_close(ours.train()(images()), theirs.train()(images()), rtol=1e-5, atol=1e-5)


def test_a_bad_initialisation_changes_nothing():
    ours, _ = pair()
    before = ours.pos_embed.clone()
    with pytest.raises(ValueError, match="weight_init is 'bogus'"):
        ours.init_weights("bogus")
    assert torch.equal(ours.pos_embed, before)


def test_patch_dropout_leaves_no_map():
    ours, _ = pair(patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="ask for output_fmt='NLC'"):
        ours.train().forward_intermediates(images())
    assert len(ours.forward_intermediates(images(), map(int, "02"), output_fmt="NLC")[1]) == 2


def test_sizes_as_lists():
    ours, theirs = pair(img_size=[32, 32], patch_size=[8, 8])
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


def test_timms_data_utilities_read_the_model():
    ours = fastvit.create_model("vit_tiny_patch16_384", depth=1)
    theirs = timm.create_model("vit_tiny_patch16_384", depth=1)
    assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(theirs)
