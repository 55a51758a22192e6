"""Launches: what is decided from shapes alone, before anything runs."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import fastvit_kernels as kernels
import fastvit_kernels.attention
from fastvit_kernels import launch, tiles
from fastvit_kernels.attention import chunks_of, programs_of
from fastvit_kernels.attention_options import Options, tail_of
from fastvit_kernels.launch import Launch, check_grid, needs_int64, vector_width


def meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def test_int64_is_for_what_lies_2_to_the_31_away():
    last = 2**31 - 1
    assert not needs_int64(meta(last + 1))
    assert needs_int64(meta(last + 2))
    assert not needs_int64(meta(2, last // 2).mT, None)
    # A view of little memory that spans much, as a slice does; and one that spans none.
    assert needs_int64(meta(1).as_strided((2, 2), (last, 1)))
    assert not needs_int64(meta(8).expand(2**20, 2**20, 8))
    assert needs_int64(meta(3), meta(2**16, 2**16))
    assert not needs_int64()


# A head's own rows are what inner offsets reach; where an image or a head begins is 64 bits anyway.
def test_attention_asks_it_of_one_head_alone():
    def wide(*size, token=None):
        qkv = meta(1).as_strided(size, (size[1] * token, token, size[3], 1))
        out, lse = meta(size[0], size[1], size[2] * size[3]), meta(*size[:3])
        return kernels.attention.plan_fwd(qkv, qkv, qkv, out, lse, Options(0.1), "sm_90").constants["F"].int64

    assert not wide(2**12, 577, 12, 64, token=3 * 768)
    assert wide(1, 577, 12, 64, token=2**23)


def test_the_grid_is_one_that_cuda_takes():
    check_grid((2**31 - 1, 65535, 65535))
    check_grid((0,))
    for grid, axis in (((2**31,), "x"), ((1, 65536), "y"), ((1, 1, 65536), "z")):
        with pytest.raises(ValueError, match=f"programs in {axis}, and CUDA takes"):
            check_grid(grid)


def test_a_launch_too_large_is_refused_before_it_runs():
    kernel = mock.MagicMock()
    with pytest.raises(ValueError, match="split the batch"):
        Launch(kernel, (2**31,), {"x": meta(1)})()
    Launch(kernel, (0,), {"x": meta(1)})()
    kernel.__getitem__.assert_not_called()


def test_a_launch_gives_the_kernel_everything_on_its_tensors_device():
    kernel, x, guard = mock.MagicMock(), meta(3), mock.MagicMock()
    with mock.patch.object(launch, "device_guard", guard):
        guard.return_value.__enter__.side_effect = lambda: kernel.__getitem__.assert_not_called()
        Launch(kernel, (7,), {"none": None, "x": x, "n": 3}, {"BLOCK": 16}, num_warps=8, num_stages=3)()
    guard.assert_called_once_with(x)
    guard.return_value.__enter__.assert_called_once_with()
    kernel.__getitem__.assert_called_once_with((7,))
    kernel.__getitem__.return_value.assert_called_once_with(
        none=None, x=x, n=3, BLOCK=16, num_warps=8, num_stages=3, enable_fp_fusion=True, launch_pdl=False
    )


def test_a_tensor_on_a_gpu_makes_it_current():
    with mock.patch("torch.cuda.device") as device:
        on_gpu = mock.Mock(is_cuda=True, device=torch.device("cuda", 1))
        assert launch.device_guard(on_gpu) is device.return_value
        device.assert_called_once_with(torch.device("cuda", 1))
        assert isinstance(launch.device_guard(torch.empty(1)), nullcontext)


def test_rows_are_read_as_wide_as_every_stride_allows():
    assert vector_width(meta(2, 8, 64)) == 8
    assert vector_width(meta(2, 8, 64), meta(4, 12)) == 4
    assert vector_width(meta(4, 6), None) == 2
    assert vector_width(meta(3, 5)) == 1
    assert vector_width(meta(5)) == 8
    assert vector_width(meta(64).expand(3, 64)) == 8


def test_the_architecture_is_named_as_nvidia_names_it():
    launch._capability.cache_clear()
    with mock.patch("torch.cuda.get_device_capability", side_effect=[(9, 0), (12, 0)]):
        assert launch.arch_of(torch.device("cuda", 0)) == "sm_90"
        assert launch.arch_of(torch.device("cuda", 1)) == "sm_120"
    launch._capability.cache_clear()
    assert launch.arch_of(torch.device("cpu")) == "cpu"
    assert tiles.table("cpu") == tiles.table("an architecture of tomorrow")


def test_a_tail_is_the_narrowest_block_that_holds_the_rest():
    assert [tail_of(tokens, 64) for tokens in (64, 65, 80, 81, 97, 127, 128)] == [0, 16, 16, 32, 64, 64, 0]
    for block in (16, 32, 64, 128):
        for tokens in range(1, 300):
            rest, tail = tokens % block, tail_of(tokens, block)
            assert rest <= tail <= block
            assert tail == 0 or tail == 16 or tail < 2 * rest


def test_chunks_cover_the_tokens_with_least_to_spare():
    assert chunks_of(197) == (128, 64, 16)
    assert chunks_of(64) == (64,)
    assert chunks_of(256) == (128, 64, 64)  # 128 + 128 spilled
    covers = {
        a + b + c for a in (16, 32, 64, 128) for b in (0, 16, 32, 64, 128) for c in (0, 16, 32, 64, 128)
    }
    for tokens in range(1, 385):
        chunks = chunks_of(tokens)
        assert sum(chunks) == min(cover for cover in covers if cover >= tokens)
        assert list(chunks) == sorted(chunks, reverse=True)
        assert len(chunks) <= 3


@pytest.mark.parametrize(
    ("heads", "programs"), [(12, 4), (96, 2), (192, 1), (264, 1), (300, 2), (384, 2), (528, 1), (3072, 1)]
)
def test_programs_by_waves(heads, programs):
    """Of 197 tokens on an H100: 384 heads were two waves of four blocks, and are three of two."""
    assert programs_of(heads, 4, 264) == programs


def test_no_number_of_programs_leaves_more_of_the_gpu_idle():
    for heads in range(0, 3000, 7):
        for blocks in range(1, 7):
            chosen = programs_of(heads, blocks, 264)
            assert 1 <= chosen <= blocks
            waves = [-(-heads * p // 264) * (-(-blocks // p) + 0.5) for p in range(1, blocks + 1)]
            assert waves[chosen - 1] == min(waves)


def attention_launches(tokens, arch, dtype=torch.float16):
    q = meta(2, tokens, 3, 6, 64, dtype=dtype)
    (q, k, v), lse = q.unbind(2), meta(2, 6, tokens)
    out = meta(2, tokens, 384, dtype=dtype)
    dqkv = meta(2, tokens, 3, 6, 64, dtype=dtype)
    yield kernels.attention.plan_fwd(q, k, v, out, lse, Options(0.125), arch)
    facts = meta(2, 6, tokens, 4)
    yield from kernels.attention.plan_bwd(out, q, k, v, out, lse, dqkv, facts, (), Options(0.125), arch)


# Images of many sizes must not compile a kernel each: a variant for each way to cut the tokens is enough.
@pytest.mark.parametrize("arch", [*tiles.ARCHITECTURES, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_token_counts_share_few_variants(arch, dtype):
    variants = {}
    for tokens in range(1, 601):
        for planned in attention_launches(tokens, arch, dtype):
            key = (planned.num_warps, planned.num_stages, *sorted(planned.constants.items(), key=str))
            name = planned.kernel.__name__, planned.constants.get("OWNER")
            variants.setdefault(name, set()).add(str(key))
    forward = variants.pop(("_attention_fwd_kernel", None))
    assert len(forward) <= 48
    assert len(variants) == (3 if arch == "sm_90" and dtype == torch.float16 else 2)
    assert all(len(seen) <= 16 for seen in variants.values())


def test_batches_heads_and_strides_share_one_variant():
    keys = set()
    for batch, heads, width in ((1, 6, 3 * 384), (8, 12, 3 * 768), (64, 6, 4096)):
        qkv = meta(1).as_strided((batch, 197, heads, 64), (197 * width, width, 64, 1))
        out, lse = meta(batch, 197, heads * 64), meta(batch, heads, 197)
        planned = kernels.attention.plan_fwd(qkv, qkv, qkv, out, lse, Options(0.125), "sm_90")
        keys.add(str(sorted(planned.constants.items(), key=str)))
        assert set(planned.kernel.arg_names if hasattr(planned.kernel, "arg_names") else planned.args) >= set(
            planned.args
        )
    assert len(keys) == 1


def test_a_table_entry_that_is_missing_is_an_error():
    empty = mock.patch.object(tiles, "table", lambda arch: {"attention_fwd": []})
    with empty, pytest.raises(LookupError, match="no tile for attention_fwd on sm_90 in half"):
        tiles.tile("attention_fwd", "sm_90", "half", tokens=1)
