"""Kernels run where and when torch's own would: on the current stream, in a captured graph, on any GPU."""

import pytest
import torch
from gpu_calls import DELAY, EVERY_OP, call_of, flipped, given_tensors, run, same
from op_cases import converted

pytestmark = pytest.mark.needs(runtime=True)


@pytest.mark.parametrize("op", EVERY_OP)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_waits_for_a_delayed_producer_on_its_stream(op, full, gpu):
    call = call_of(op, full=full)
    expected = run(op, call)
    late = call | {name: torch.zeros_like(tensor) for name, tensor in given_tensors(call).items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        for name, tensor in given_tensors(call).items():
            late[name].copy_(tensor)
        found = run(op, late)
    side.synchronize()
    same(found, expected)


@pytest.mark.parametrize("op", EVERY_OP)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_graph_replays_with_new_inputs(op, full, dtype, gpu):
    """Captured under ``use_backend``, which ``run`` enters, and replayed outside it."""
    first = call_of(op, dtype, full=full)
    held = converted(first, torch.clone)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(op, held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(op, held)
    for call in (flipped(first), first):
        for name, tensor in given_tensors(call).items():
            held[name].copy_(tensor)
        graph.replay()
        same(found, run(op, call))


@pytest.mark.needs(gpus=2)
@pytest.mark.parametrize("op", EVERY_OP)
def test_runs_on_the_gpu_of_its_tensors(op, gpu):
    call = call_of(op, full=True)
    expected = run(op, call)
    found = run(op, converted(call, lambda tensor: tensor.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    for name, tensor in found.items():
        assert tensor.device == torch.device("cuda:1")
        torch.testing.assert_close(tensor.to(gpu), expected[name], rtol=0.02, atol=0.02)
