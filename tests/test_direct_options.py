"""Masks and rotary positions of blocks whose ops were decided before."""

from unittest import mock

import pytest
import timm
import torch
from direct_blocks import DIM, KERNELS, TOKENS, block, ordinary, tokens

import fastvit
from fastvit import backends
from fastvit.layers import direct


@pytest.fixture(autouse=True)
def fresh():
    direct.forget()
    yield
    direct.forget()


@pytest.fixture
def resolved():
    """How often an op was resolved."""
    with mock.patch.object(backends, "resolve", mock.Mock(wraps=backends.resolve)) as resolve:
        yield resolve


ROPE = {"depth": 1, "embed_dim": DIM, "num_heads": 2, "img_size": 32, "patch_size": 16, "num_classes": 0}


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("layout", [False, True], ids=["interleaved", "half"])
def test_rotary_positions(resolved, mode, layout):
    torch.manual_seed(0)
    model = timm.models.eva.Eva(**ROPE, use_rot_pos_emb=True, rope_rotate_half=layout).eval()
    made, x = fastvit.accelerate(model, mode), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        expected = ordinary(lambda: made(x))
        first, before = made(x), resolved.call_count
        second = made(x)
        assert [call.args[0] for call in resolved.call_args_list[before:]] == ["patch_embed"]
        made.rope = None  # the positions: blocks are called without them
        assert not torch.allclose(made(x), first)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_masks(resolved):
    made, x = block(), tokens(2)
    masks = [
        torch.rand(TOKENS, TOKENS) > 0.3,
        torch.rand(2, 1, TOKENS, TOKENS) > 0.3,
        torch.randn(2, 2, TOKENS, TOKENS),
    ]
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for mask in masks:
            expected = ordinary(lambda mask=mask: made(x, attn_mask=mask))
            made(x, attn_mask=mask)
            before = resolved.call_count
            assert torch.equal(made(x, attn_mask=mask), expected)
            assert resolved.call_count == before
            # Other numbers in a mask of the same kind.
            other = mask.flip(-1)
            again = made(x, attn_mask=other)
            assert resolved.call_count == before
            assert torch.equal(again, ordinary(lambda other=other: made(x, attn_mask=other)))
        for bad in (torch.zeros(3, TOKENS, TOKENS), torch.zeros(TOKENS, TOKENS, dtype=torch.int64)):
            with pytest.raises((ValueError, TypeError)):
                made(x, attn_mask=bad)
        with pytest.raises(fastvit.BackendUnavailable):
            made(x, is_causal=True)
