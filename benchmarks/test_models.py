"""A whole model at inference by every provider; one that misses the parity contract fails, untimed."""

import pytest
import torch
from rich.console import Console

from fastvit_benchmarks import bench_model, model_peers, op_bench, roofline


@pytest.fixture(scope="module")
def subject(request):
    option = request.config.getoption
    how = option("--model"), option("--batch-size"), option("--dtype"), torch.device(option("--device"))
    return bench_model.Subject(*how)


@pytest.fixture(scope="module")
def model_and_images(subject):
    model = subject.model().eval()
    return model, subject.images(model, 1)[0]


@pytest.mark.parametrize(
    "peer", (*model_peers.TORCH, *model_peers.OURS, *model_peers.ENGINES), ids=lambda peer: peer.name
)
@torch.no_grad()
def test_model(timed, subject, model_and_images, peer):
    model, x = model_and_images
    torch.compiler.reset()
    with roofline.products_in(subject.dtype), op_bench.at_its_best():
        ready = bench_model.prepare(subject, model, x, (peer,), Console(quiet=True))
        if peer.name in ready.absent:
            pytest.skip(ready.absent[peer.name])
        verdict = ready.verdicts[peer.name]
        assert verdict.ok, str(verdict)
        call = ready.calls[peer.name]
        timed(lambda: call(x), subject.title, provider=peer.name)
