"""The cases of the ops' benchmarks: what they count, what they are made of, and who is offered for them."""

import pytest
import torch

from fastvit_benchmarks import bench_attention, bench_ops, bench_patch_embed
from fastvit_benchmarks.bench_attention import Attention
from fastvit_benchmarks.bench_patch_embed import PatchEmbed

CPU = torch.device("cpu")
SMALL = (
    Attention("fwd", "float32", 3, 5, 2, 4),
    PatchEmbed("fwd", "float32", 2, 4, 8, side=8),
    PatchEmbed("fwd", "float32", 2, 4, 8, bytes=True, side=8),
)


def test_work_of_attention_is_counted():
    """Two products forward, and of the backward's five one is forward's again."""
    product = 2 * 64 * 12 * 197**2 * 64
    tensor = 64 * 197 * 12 * 64 * 2
    expected = {"fwd": (2, 4), "bwd": (5, 7), "step": (7, 8)}
    for direction, (products, tensors) in expected.items():
        case = Attention(direction, "bfloat16", 64, 197, 12, 64)
        assert (case.flops, case.bytes_moved) == (products * product, tensors * tensor)


def test_work_of_patch_embed_is_counted():
    images, tokens = 8 * 3 * 224**2, 8 * 197 * 768
    weights = 768 * (3 * 256 + 1 + 197 + 1)
    product = 2 * 8 * 196 * 768 * 768
    case = PatchEmbed("fwd", "float16", 8, 16, 768)
    assert (case.flops, case.bytes_moved) == (product, 2 * (images + tokens + weights))
    case = PatchEmbed("bwd", "float32", 8, 16, 768, bytes=True)
    assert (case.flops, case.bytes_moved) == (product, images + 4 * (tokens + weights))
    case = PatchEmbed("step", "float32", 8, 16, 768)
    assert (case.flops, case.bytes_moved) == (2 * product, 4 * (images + 2 * tokens + 2 * weights))


def test_inputs_are_the_same_for_a_seed_and_others_for_another():
    for case in SMALL:
        first, again, other = (case.inputs(seed, CPU) for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["grad"], other["grad"])


@pytest.mark.parametrize("module", [bench_attention, bench_patch_embed])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_is_a_handful(module, device):
    everything, quick = (
        list(module.cases(torch.device(device), quick, ("float32", "bfloat16"))) for quick in (False, True)
    )
    assert len(quick) <= 20 < len(everything)
    assert len({case.title for case in everything}) == len(everything)


def test_every_op_has_cases_and_providers_here():
    for case, providers in bench_ops.cases([], CPU, ["float32"], "", quick=True):
        offered, left_out = providers(case, CPU)
        assert next(iter(offered)) in ("eager", "sdpa")
        assert not offered.keys() & left_out.keys()
