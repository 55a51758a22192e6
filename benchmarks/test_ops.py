"""Every op by every provider; one that misses the parity contract fails, and is not timed."""

from functools import cache

import pytest
import torch

from fastvit_benchmarks import bench, bench_ops, op_bench, roofline


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, quick = torch.device(option("--device")), not option("--all-cases")
    found = {}
    for case, providers in bench_ops.cases([], device, [option("--dtype")], "", quick):
        for name, provider in providers(case, device)[0].items():
            found[f"{case.title}: {name}"] = (case, name, provider)
    metafunc.parametrize("case, name, provider", found.values(), ids=found)


@cache
def known(case, device):
    """The case's inputs and what its results are judged by: the same for all of its providers."""
    inputs = case.inputs(0, device)
    return inputs, op_bench.truth(case, inputs)


def test_op(timed, request, case, name, provider):
    device = torch.device(request.config.getoption("--device"))
    torch.compiler.reset()
    with roofline.products_in(case.dtype), bench.at_its_best():
        inputs, truth = known(case, device)
        try:
            call = provider(case, inputs)
            results = call()
        except Exception as error:  # each library raises its own for what it cannot run
            pytest.skip(bench.in_words(error))
        failed = [str(check) for check in op_bench.checks(case, results, *truth) if not check.ok]
        assert not failed
        timed(call, case.title, provider=name, flops=case.flops, bytes_moved=case.bytes_moved)
