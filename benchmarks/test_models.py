"""A whole model at inference by every provider; one that misses the parity contract fails, untimed."""

import pytest
import torch
from rich.console import Console

from fastvit_benchmarks import bench, bench_model, model_peers, roofline
from fastvit_benchmarks.outputs import Outputs

PEERS = (*model_peers.TORCH, *model_peers.OURS, *model_peers.ENGINES)


@pytest.fixture(scope="module")
def model(request):
    option = request.config.getoption
    how = option("--model"), option("--batch-size"), option("--dtype"), torch.device(option("--device"))
    subject = bench_model.Subject(*how)
    made = bench_model.ModelBench(subject, PEERS, 1, Console(quiet=True), Outputs())
    with torch.no_grad(), roofline.products_in(subject.dtype):
        made.begin()
    return made


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@torch.no_grad()
def test_model(timed, model, peer):
    subject = model.subject
    if reason := peer.missing(subject.device, subject.torch_dtype):
        pytest.skip(reason)
    torch.compiler.reset()
    with roofline.products_in(subject.dtype), bench.at_its_best():
        try:
            calls = model.prepare(peer.name)
        except Exception as error:  # each library raises its own for what it cannot run
            pytest.skip(bench.in_words(error))
        (verdict,) = model.checks[peer.name]
        assert verdict.ok, str(verdict)
        timed(calls["fwd"], subject.title, provider=peer.name)
