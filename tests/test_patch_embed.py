"""patch_embed: torch's convolution and timm's embedding, from floats and from bytes."""

import op_cases
import pytest
import torch
import torch.nn.functional as F
from op_checks import TIGHT, equal_in_float64, refuses, within_contract
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer

from fastvit.ops import patch_embed
from fastvit.regimes import DTYPES, TOKENS
from fastvit.verification import randomize

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("cell", op_cases.cells("patch_embed"), ids=op_cases.name)
def test_is_the_plain_statement(cell):
    equal_in_float64("patch_embed", op_cases.build("patch_embed", **cell))


@pytest.mark.parametrize("cell", op_cases.cells("patch_embed", dtype=DTYPES), ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("patch_embed", op_cases.build("patch_embed", **cell))


# One pixel, one channel or one patch is an image too. Dropped: their combinations with the options.
@pytest.mark.parametrize(
    "sizes",
    [{"width": 1}, {"channels": 1}, {"grid": (1, 1)}, {"patch": (1, 1)}, {"grid": (1, 1), "patch": (1, 1)}],
    ids=op_cases.name,
)
def test_smallest_sizes(sizes):
    equal_in_float64("patch_embed", op_cases.build("patch_embed", normalized="tensors", **sizes))


# Pairwise over data, dtypes, tokens, patches of today's models (and one that is odd) and prefixes. Dropped:
# the full product (1152), and with 14 or 16 pixels a patch more tokens than 257, for time alone.
GRID = op_cases.regime_cells(
    "patch_embed",
    lambda cell: cell["tokens"] < 300 or cell["patch"] < 14,
    tokens=TOKENS,
    patch=(4, 5, 14, 16),
    prefix=(0, 1, 5),
)


@pytest.mark.parametrize("cell", GRID, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    within_contract("patch_embed", op_cases.regime_call("patch_embed", batch=1, width=48, **cell))


@pytest.mark.parametrize("bias", [True, False])
def test_is_timms_patch_embedding(bias):
    theirs = randomize(PatchEmbed(img_size=(16, 24), patch_size=8, embed_dim=12, bias=bias).double())
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(
        patch_embed(images, theirs.proj.weight, theirs.proj.bias), theirs(images), **TIGHT
    )


# Every place a position embedding is added in, with the prefix tokens that timm puts there.
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"class_token": False},
        {"reg_tokens": 4},
        {"no_embed_class": True},
        {"no_embed_class": True, "reg_tokens": 4},
        {"class_token": False, "reg_tokens": 1, "no_embed_class": True},
        {"pos_embed": "none"},
    ],
    ids=op_cases.name,
)
def test_is_timms_embedding(arguments):
    pool = {} if arguments.get("class_token", True) else {"global_pool": "avg"}
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 0, "num_heads": 1, "num_classes": 0}
    theirs = randomize(VisionTransformer(**sizes, **pool, **arguments).double())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    prefix = [token for token in (theirs.cls_token, theirs.reg_token) if token is not None]
    out = patch_embed(
        images,
        theirs.patch_embed.proj.weight,
        theirs.patch_embed.proj.bias,
        theirs.pos_embed,
        torch.cat(prefix, dim=1) if prefix else None,
    )
    torch.testing.assert_close(out, theirs._pos_embed(theirs.patch_embed(images)), **TIGHT)


@pytest.mark.parametrize("as_tensors", [True, False])
def test_every_byte_is_normalized_as_in_float64(as_tensors):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    weight = torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1)
    colours = {name: torch.tensor(value, dtype=torch.float64) for name, value in IMAGENET.items()}
    truth = (images.double() / 255 - colours["mean"][:, None, None]) / colours["std"][:, None, None]
    out = patch_embed(images, weight, **(colours if as_tensors else IMAGENET))
    torch.testing.assert_close(out, truth.flatten(2).mT, **TIGHT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_rounded_once(dtype):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    out = patch_embed(images, torch.eye(3, dtype=dtype).reshape(3, 3, 1, 1), **IMAGENET)
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in IMAGENET.values())
    assert torch.equal(out, ((images / 255 - mean) / std).to(dtype).flatten(2).mT)


def test_floats_are_not_divided_by_255():
    images, weight = torch.rand(1, 3, 8, 8), torch.randn(4, 3, 4, 4)
    mean, std = torch.tensor(IMAGENET["mean"]), torch.tensor(IMAGENET["std"])
    normalized = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(patch_embed(images, weight, **IMAGENET), patch_embed(normalized, weight))


def test_integers_may_be_colours():
    images, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4)
    plain = F.conv2d(images / 2, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(patch_embed(images, weight, mean=[0, 0, 0], std=(2, 2, 2)), plain)


IMAGES, BYTES, WEIGHT = (
    torch.randn(2, 3, 8, 8),
    torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    torch.randn(6, 3, 4, 4),
)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": IMAGES[0]}, ValueError, "images must be [B, C, H, W]"),
        ({"weight": WEIGHT.flatten(1)}, ValueError, "weight must be [D, C, ph, pw]"),
        ({"images": IMAGES[:, :2]}, ValueError, "images have 2 channels; the weight takes 3"),
        ({"images": IMAGES[..., 1:]}, ValueError, "images are 8x7, not a multiple of the patch, 4x4"),
        ({"images": IMAGES[..., 1:, :]}, ValueError, "images are 7x8, not a multiple of the patch"),
        ({"images": IMAGES[..., :0]}, ValueError, "images are 8x0, not a multiple of the patch"),
        ({"weight": WEIGHT[..., :0]}, ValueError, "not a multiple of the patch, 4x0"),
        ({"images": IMAGES.long()}, TypeError, "images (unless uint8) must be floating point"),
        ({"weight": WEIGHT.long()}, TypeError, "weight must be floating point"),
        ({"images": IMAGES.half()}, TypeError, "images is torch.float16, but weight is torch.float32"),
        ({"bias": torch.ones(6).double()}, TypeError, "bias is torch.float64"),
        ({"images": IMAGES.to("meta")}, ValueError, "images is on meta, but weight is on cpu"),
        ({"images": BYTES.to("meta")}, ValueError, "images is on meta, but weight is on cpu"),
        ({"pos_embed": torch.ones(1, 4, 6, device="meta")}, ValueError, "pos_embed is on meta"),
        ({"mean": torch.ones(3, device="meta")}, ValueError, "mean is on meta"),
        ({"bias": torch.ones(5)}, ValueError, "bias must have shape [6]"),
        ({"prefix": torch.ones(1, 6)}, ValueError, "prefix must be [1, P, D]"),
        ({"prefix": torch.ones(2, 1, 6)}, ValueError, "prefix must have shape [1, 1, 6]"),
        ({"prefix": torch.ones(1, 1, 5)}, ValueError, "prefix must have shape [1, 1, 6]"),
        ({"pos_embed": torch.ones(4, 6)}, ValueError, "pos_embed must have shape [1, 4, 6]"),
        (
            {"pos_embed": torch.ones(1, 5, 6)},
            ValueError,
            "for 4 patches and 0 prefix tokens; it has [1, 5, 6]",
        ),
        ({"pos_embed": torch.ones(2, 4, 6)}, ValueError, "pos_embed must have shape [1, 4, 6]"),
        ({"mean": [0.5, 0.5]}, ValueError, "mean must have shape [3]"),
        ({"std": torch.ones(1, 3)}, ValueError, "std must have shape [3]"),
    ],
)
def test_refuses(change, error, words):
    refuses("patch_embed", {"images": IMAGES, "weight": WEIGHT} | change, error, words)
