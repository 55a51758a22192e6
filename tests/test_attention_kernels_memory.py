"""attention on the Triton kernels: where the numbers lie, and how wide offsets are, changes no result.

All launches here run in red zones as well: see kernel_checks.
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import attention_within_contract
from kernel_launches import FORMS, attention_form, attention_launch, on_device
from memory import guarded
from test_op_layouts import offset, sliced

import fastvit_kernels as kernels
import fastvit_kernels.attention

FULL = op_cases.FULL["attention"]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}


def tokens_innermost(tensor):
    """Heads before tokens: how another library's q, k and v come."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def expanded(tensor):
    """The first image's, seen by all."""
    return tensor[:1].expand_as(tensor)


def same(found, expected, close=None):
    close = close or CLOSE[expected["out"].dtype]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **close, msg=lambda text, name=name: f"{name}: {text}"
        )


def call_of(dtype=torch.float32, tokens=18, **options):
    return on_device(op_cases.build("attention", dtype=dtype, tokens=tokens, **options))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("misalign", [1])
def test_misaligned_tensors(dtype, form, misalign):
    call = call_of(dtype, head_dim=24, **FULL)
    with attention_form(kernels, form):
        expected = attention_launch(kernels, call, "contiguous")
        same(attention_launch(kernels, call, "contiguous", misalign=misalign), expected)


# q, k and v of their own, each laid out in its own way. Dropped: the other orders of the same layouts.
@pytest.mark.parametrize(
    "layouts",
    [
        (torch.Tensor.contiguous, sliced, tokens_innermost),
        (sliced, tokens_innermost, offset),
        (tokens_innermost, offset, sliced),
    ],
    ids=["q contiguous", "q sliced", "q by heads"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, FULL], ids=["bare", "full"])
def test_separate_tensors(layouts, form, options):
    call = call_of(**options)
    with attention_form(kernels, form):
        expected = attention_launch(kernels, call, "contiguous")
        same(attention_launch(kernels, call, "contiguous", layouts=layouts), expected)


def test_one_image_seen_by_the_whole_batch():
    call = call_of()
    shared = call | {"qkv": call["qkv"][:1].repeat(2, 1, 1)}
    expected = attention_launch(kernels, shared, "contiguous")
    same(attention_launch(kernels, call, "contiguous", layouts=[expanded] * 3), expected)


@pytest.mark.parametrize("layout", [sliced, tokens_innermost])
def test_a_gradient_between_other_numbers(layout):
    call = call_of()
    grad = on_device({"grad": torch.randn(2, 18, 16)})["grad"]
    laid = layout(grad.unflatten(-1, (2, 8))).flatten(2) if layout is tokens_innermost else layout(grad)
    same(attention_launch(kernels, call, laid), attention_launch(kernels, call, grad))


MASKS = {
    "one for all": lambda mask: mask,
    "transposed": lambda mask: mask.mT.contiguous().mT,
    "sliced": sliced,
    "a row for all": lambda mask: mask[..., :1, :],
    "a key for all": lambda mask: mask[..., :1],
    "a mask a head": lambda mask: torch.stack([mask, mask.flip(-1)], dim=-3).squeeze(),
    "a mask an image": lambda mask: torch.stack([mask, mask.flip(-1)]).reshape(2, 1, *mask.shape[-2:]),
}


@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(layout, kind):
    call = call_of()
    mask = torch.randn(18, 18, generator=torch.Generator().manual_seed(1))
    mask = MASKS[layout](mask > -0.5 if kind == "bool" else mask).to(call["qkv"].device)
    whole = call | {"attn_mask": mask.expand(2, 2, 18, 18).contiguous()}
    same(
        attention_launch(kernels, call | {"attn_mask": mask}, "contiguous"),
        attention_launch(kernels, whole, "contiguous"),
    )
    attention_within_contract(kernels, call | {"attn_mask": mask})


def test_a_strided_key_mask():
    call = call_of(key_mask=True)
    strided = call | {"key_mask": call["key_mask"].mT.contiguous().mT}
    assert strided["key_mask"].stride() == (1, 2)
    same(attention_launch(kernels, strided, "contiguous"), attention_launch(kernels, call, "contiguous"))


@pytest.mark.parametrize(
    "layout", [sliced, lambda table: table.mT.contiguous().mT], ids=["sliced", "transposed"]
)
def test_rotary_tables_of_different_strides(layout):
    call = call_of(rope="half", prefix=1)
    moved = call | {"rope_cos": layout(call["rope_cos"])}
    same(attention_launch(kernels, moved, "contiguous"), attention_launch(kernels, call, "contiguous"))


@contextmanager
def wide_offsets():
    """Every launch is planned as if its tensors were huge."""
    wide = []

    def widened(launch):
        wide.append(launch.constants["F"]._replace(int64=True))
        return replace(launch, constants=launch.constants | {"F": wide[-1]})

    forward, backward = kernels.attention.plan_fwd, kernels.attention.plan_bwd
    plans = {
        "plan_fwd": lambda *args: widened(forward(*args)),
        "plan_bwd": lambda *args: tuple(map(widened, backward(*args))),
    }
    with mock.patch.multiple(kernels.attention, **plans):
        yield
    assert len(wide) == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, FULL], ids=["bare", "full"])
def test_wide_offsets_give_the_same_bits(form, options):
    call = call_of(tokens=33, **options)
    with attention_form(kernels, form):
        expected = attention_launch(kernels, call, "contiguous")
        with wide_offsets():
            found = attention_launch(kernels, call, "contiguous")
    same(found, expected, {"rtol": 0, "atol": 0})


@st.composite
def calls(draw):
    """A call of any size with any of the kernels' options, its tensors laid out in their own ways."""
    options = draw(st.sampled_from(op_cases.cells("attention")).filter(lambda cell: cell["mask"] != "causal"))
    tokens, head_dim = draw(st.integers(3, 80)), draw(st.integers(1, 96))
    head_dim += head_dim % 2 if options["rope"] else 0
    batch, heads = draw(st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 1), (1, 3)]))
    sizes = {"tokens": tokens, "head_dim": head_dim, "batch": batch, "heads": heads}
    call = op_cases.build("attention", dtype=torch.float32, **options | sizes)
    layouts = draw(st.tuples(*[st.sampled_from((torch.Tensor.contiguous, sliced, tokens_innermost))] * 3))
    return on_device(call), layouts, draw(st.integers(0, 3))


# Whole calls take the interpreter seconds each, so there are few, of few heads.
@settings(max_examples=12)
@given(calls(), st.sampled_from([None, *FORMS]), st.sampled_from([None, "contiguous", "sum", "transposed"]))
def test_any_size_in_any_layout(drawn, form, grad):
    call, layouts, misalign = drawn
    if call["qkv"].numel() == 0:
        assert attention_launch(kernels, call, grad, layouts=layouts)["out"].numel() == 0
        return
    # Against itself, contiguous: what is computed is judged elsewhere, at every size that a tile may have.
    with attention_form(kernels, form):
        found = attention_launch(kernels, call, grad, layouts=layouts, misalign=misalign)
        same(found, attention_launch(kernels, call, grad), {"rtol": 1e-4, "atol": 1e-4})
    if call.get("qk_norm") is None or call["qkv"].shape[-1] // call["num_heads"] // 3 > 2:
        attention_within_contract(kernels, call)


def test_red_zones_see_what_they_should():
    call = call_of()
    wide = guarded(call["qkv"])
    assert wide.as_strided((1,), (1,), wide.storage_offset() - 1).isnan().all()
