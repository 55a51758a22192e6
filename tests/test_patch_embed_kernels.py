"""patch_embed on the Triton kernels: tokens and gradients by the contract, in red zones."""

from itertools import product
from unittest import mock

import op_cases
import pytest
import torch
from kernel_checks import embed_within_contract
from kernel_launches import DEVICE, DTYPES, EMBED_INPUTS, GPU, GRADS, PRECISIONS, embed_launch, on_device
from test_op_layouts import channels_last, sliced, strided

import fastvit_kernels as kernels
import fastvit_kernels.patch_embed
from fastvit.regimes import TOKENS, pairwise

LAYOUTS = {
    "nchw": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "sliced": sliced,
    "strided": strided,
    "channels_last, sliced": lambda images: (
        sliced(images.movedim(1, -1).flatten(2)).unflatten(-1, (-1, images.shape[1])).movedim(-1, 1)
    ),
}


def judged(cell, build=lambda **sizes: op_cases.build("patch_embed", **sizes), misalign=0):
    cell = dict(cell)
    grad, layout, precision = (
        cell.pop("grad", None),
        cell.pop("layout", "nchw"),
        cell.pop("precision", "ieee"),
    )
    call = build(**cell)
    call["images"] = LAYOUTS[layout](call["images"])
    embed_within_contract(kernels, call, grad, precision=precision, misalign=misalign)


def _runs(cell):
    """In this place: bfloat16 and tf32 are a GPU's."""
    return cell["dtype"] in DTYPES and (cell["dtype"] == torch.float32 or cell["precision"] != "tf32")


# Pairwise over data, dtypes, tokens, patches and prefixes. Dropped: the full product; 196 tokens, which are
# cut as 197 are; and in the interpreter, for time alone, what MOST_TOKENS does not allow.
MOST_TOKENS = {4: 577, 5: 257, 14: 50, 16: 50}
REGIMES = op_cases.regime_cells(
    "patch_embed",
    lambda cell: _runs(cell) and (GPU or cell["tokens"] <= MOST_TOKENS[cell["patch"]]),
    tokens=tuple(tokens for tokens in TOKENS if tokens != 196),
    patch=(4, 5, 14, 16),
    prefix=(0, 1, 5),
    grad=(None, *GRADS),
    precision=PRECISIONS,
)


@pytest.mark.parametrize("cell", REGIMES, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    judged(cell, lambda **sizes: op_cases.regime_call("patch_embed", batch=1, width=40, **sizes))


# Every geometry with every layout and kind of gradient, pairwise: patches of today's models, odd ones, sides
# that differ, single pixels. Dropped: the full product, and the options, which come below; in the
# interpreter, for time alone, 32 x 32 pixels of more than three channels.
GEOMETRY = pairwise(
    lambda cell: GPU or cell["patch"] != (32, 32) or cell["channels"] <= 3,
    patch=((16, 16), (14, 14), (8, 8), (32, 32), (5, 5), (2, 3), (1, 1)),
    channels=(3, 1, 4, 8),
    width=(48, 33, 8),
    layout=tuple(LAYOUTS),
    images=("float", "uint8"),
    dtype=DTYPES,
    grad=(None, *GRADS),
)


@pytest.mark.parametrize("cell", GEOMETRY, ids=op_cases.name)
def test_every_geometry_is_within_the_contract(cell):
    judged(cell | {"grid": (2, 5)})


OPTIONS = pairwise(
    lambda cell: op_cases._says_something("patch_embed", cell),
    **op_cases.OPTIONS["patch_embed"] | {"normalized": (None, "tensors", "mean", "std"), "patch": ((2, 3),)},
    layout=("nchw", "channels_last", "sliced"),
    dtype=DTYPES,
    grad=(None, *GRADS),
)


@pytest.mark.parametrize("cell", OPTIONS, ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    judged(cell, misalign=1)


# Rows in several chunks, each summed by programs of its own, then added up.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", ["float", "uint8"])
def test_many_patches_are_within_the_contract(dtype, images):
    cell = {"grid": (17, 19), "patch": (2, 2), "channels": 2, "dtype": dtype, "images": images, "prefix": 5}
    size = torch.empty(2, 17 * 19, 8, dtype=dtype, device=DEVICE)
    assert kernels.patch_embed_plan.dweight_splits("cpu", size, 8, 0, "ieee") > 1
    judged(cell | {"grad": "contiguous", "normalized": "tensors"})


@pytest.mark.parametrize("needs", list(product([True, False], repeat=5)), ids=str)
def test_only_what_is_needed_is_computed(needs):
    call = on_device(op_cases.build("patch_embed", dtype=torch.float32))
    every = embed_launch(kernels, call, "contiguous")
    given = kernels.patch_embed.patch_embed_bwd(
        GRADS["contiguous"](torch.empty(2, 7, 8, device=DEVICE)),
        *(call["images"], call["weight"]),
        num_prefix=1,
        pos_embed_rows=7,
        needs=needs,
    )
    assert tuple(gradient is not None for gradient in given) == needs
    for name, gradient in zip(EMBED_INPUTS, given, strict=True):
        assert gradient is None or torch.equal(gradient, every[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_run_and_wide_offsets_give_the_same_bits(dtype, layout):
    call = op_cases.build("patch_embed", dtype=dtype, grid=(5, 7), patch=(2, 3), normalized="tensors")
    call["images"] = LAYOUTS[layout](call["images"])
    call = on_device(call)
    first, second = (embed_launch(kernels, call, "transposed") for _ in range(2))
    out = embed_launch(kernels, call)["out"]
    with mock.patch.object(kernels.patch_embed_plan, "needs_int64", lambda *_: True) as far:
        assert far()
        wide, wide_out = embed_launch(kernels, call, "transposed"), embed_launch(kernels, call)["out"]
    assert torch.equal(out, wide_out)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
        assert torch.equal(gradient, wide[name])


@pytest.mark.parametrize("images", ["float", "uint8"])
def test_an_empty_batch(images):
    call = on_device(op_cases.build("patch_embed", dtype=torch.float32, batch=0, images=images))
    assert embed_launch(kernels, call)["out"].shape == (0, 7, 8)
    for name, gradient in embed_launch(kernels, call, "contiguous").items():
        assert gradient.shape == call[name].shape
        assert gradient.count_nonzero() == 0


def test_gradients_lie_as_their_tensors_do():
    call = op_cases.build("patch_embed", dtype=torch.float32)
    call["images"] = channels_last(call["images"])
    found = embed_launch(kernels, on_device(call), "contiguous")
    assert found["images"].stride() == call["images"].stride()
    assert found["weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_kept_projection_gives_the_same_tokens():
    options = {"images": "uint8", "normalized": "tensors", "dtype": torch.float16}
    call = on_device(op_cases.build("patch_embed", **options))
    images, weight, bias = call["images"], call["weight"], call["bias"]
    colours = {"mean": call["mean"], "std": call["std"]}
    kept = kernels.patch_embed.project(images, weight, bias, **colours)
    found, expected = (
        kernels.patch_embed.patch_embed_fwd(images, weight, bias, projection=projection, **colours)
        for projection in (kept, None)
    )
    assert torch.equal(found, expected)
