"""The same bits on every run, and memory for nothing but what is returned or saved."""

import gc
from random import Random

import pytest
import torch
from gpu_calls import EVERY_OP, NATIVE, OPS, SIZES, call_of, run, same

from fastvit import ops, use_backend

of_the_allocator = pytest.mark.needs(runtime=True)
RUNS = 100
STEPS, WARMUP = 1000, 100


@pytest.mark.parametrize("op", EVERY_OP)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_a_hundred_runs_give_the_same_bits(op, full, gpu):
    call = call_of(op, full=full, batch=16)
    first = run(op, call)
    for _ in range(RUNS):
        same(run(op, call), first)


# Triton 3.6 and 3.8 may let one group of warps overwrite what the product of another still reads.
@pytest.mark.needs(runtime=True)
@pytest.mark.parametrize("op", [op for op in OPS if op not in NATIVE])
def test_a_thousand_runs_beside_others_give_the_same_bits(op, gpu):
    call = call_of(op, batch=16)
    first = run(op, call)
    random, beside = Random(0), torch.cuda.Stream()
    operands = [torch.randn(size, size, device="cuda") for size in (64, 512, 1024, 2048)]
    for _ in range(10 * RUNS):
        with torch.cuda.stream(beside):
            operand = random.choice(operands)
            torch.mm(operand, operand)
        same(run(op, call), first)


def requested(function):
    """What a call returned, and the bytes it asked for at its peak beside what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = function()
    return result, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


# Dropped: the compiled halves, which hand tokens from one product to the next.
@of_the_allocator
@pytest.mark.parametrize("op", [op for op in OPS if op not in NATIVE])
def test_inference_allocates_its_output_alone(op, gpu):
    call = call_of(op)
    with use_backend("triton"), torch.no_grad():
        getattr(ops, op)(**call)  # compiles
        out, peak = requested(lambda: getattr(ops, op)(**call))
    assert peak == out.nbytes


@of_the_allocator
def test_training_attention_keeps_output_and_log_sum_exp_and_allocates_one_gradient(gpu):
    call = call_of("attention")
    run("attention", call)
    qkv = call["qkv"].requires_grad_()
    with use_backend("triton"):
        out, peak = requested(lambda: ops.attention(**call))
    batch, tokens, heads = (SIZES["attention"][name] for name in ("batch", "tokens", "heads"))
    assert peak == out.nbytes + 4 * batch * heads * tokens
    grad = torch.ones_like(out)
    (gradient,), peak = requested(lambda: torch.autograd.grad(out, qkv, grad))
    assert gradient.nbytes == qkv.nbytes
    # In two launches the first leaves 16 bytes a query for the second.
    assert peak in (gradient.nbytes, gradient.nbytes + 16 * batch * heads * tokens)


@of_the_allocator
def test_memory_stays_flat_over_random_shapes(gpu):
    random = Random(0)
    qkv = torch.randn(32, 577, 3 * 4 * 64, device=gpu, dtype=torch.bfloat16)
    images = torch.randn(32, 3, 224, 224, device=gpu, dtype=torch.bfloat16)
    rest = call_of("patch_embed")

    def step():
        batch, tokens = random.randint(1, 32), random.choice((50, 197, 257, 577))
        run("attention", {"qkv": qkv[:batch, :tokens].contiguous(), "num_heads": 4})
        run("patch_embed", rest | {"images": images[:batch]})

    for _ in range(WARMUP):
        step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
