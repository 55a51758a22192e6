"""Launches that Triton compiles, for a GPU that is absent: test_launch_cache.py runs it, not interpreted."""

from unittest import mock

import pytest
import torch
from launch_kinds import HEADS, OPTIONS, OTHERS, TOKENS, expected, forward, tensors, uncompiled
from triton.runtime.jit import JITFunction

from fastvit_benchmarks import bench_host
from fastvit_benchmarks.no_gpu import no_gpu
from fastvit_kernels import attention, launch_cache, patch_embed
from fastvit_kernels.aot_compile import specialized
from fastvit_kernels.attention_options import Options


@pytest.fixture(autouse=True)
def fresh():
    launch_cache.forget()
    yield
    launch_cache.forget()


@pytest.fixture
def driver():
    with no_gpu() as driver:
        yield driver


def test_a_second_call_neither_plans_nor_binds(driver):
    given = [tensors() for _ in range(2)]
    for one in given:
        one["lse"] = torch.zeros(1, HEADS, TOKENS)
    plan, binds = mock.Mock(wraps=attention.plan_fwd), mock.Mock(wraps=JITFunction.run)
    with mock.patch.object(JITFunction, "run", lambda *args, **how: binds(*args, **how)):
        launch_cache.run(plan, *given[0].values(), Options(0.25), "sm_90")
        assert binds.call_count == 1
        assert plan.call_count == 2  # with its tensors, and with none that has data
        launch_cache.run(plan, *given[1].values(), Options(0.25), "sm_90")
        assert (binds.call_count, plan.call_count) == (1, 2)
    first, second = driver.launches
    # Grid, stream, function and metadata are what Triton's own launch gave; there is no hook to call.
    assert second[:6] == first[:6]
    assert second[6:9] == (None, None, None)
    fresh = attention.plan_fwd(*given[1].values(), Options(0.25), "sm_90")
    assert list(second[9:]) == expected(fresh)
    assert [*map(type, expected(fresh))] == [
        int if isinstance(value, torch.Tensor) else type(value) for value in first[9:]
    ]


@pytest.mark.parametrize("op", ["attention", "patch_embed"])
def test_a_repeated_launch_has_what_the_compiled_signature_asks_for(driver, op):
    def call():
        if op == "attention":
            return forward()
        images, weight = torch.zeros(1, 3, 16, 16), torch.zeros(32, 3, 8, 8)
        return patch_embed.patch_embed_fwd(images.half(), weight.half())

    call()
    call()
    (_, steps), arguments = next(iter(launch_cache._prepared.values())), driver.launches[-1][9:]
    signature = steps[0].compiled.src.signature
    assert len(arguments) == len(signature) == len(steps[0].kernel.arg_names)
    pointers = 0
    for value, kind in zip(arguments, signature.values(), strict=True):
        if kind == "constexpr":
            continue
        assert type(value) is (float if kind == "fp32" else int)
        pointers += kind.startswith("*")
        if kind == "i32":
            assert -(2**31) <= value < 2**31
    assert pointers == len(steps[0].pointers) == {"attention": 4, "patch_embed": 3}[op]


# What Triton compiles for is seen in no test of ours alone: its binder says for which tensors it differs.
def test_triton_compiles_for_no_more_than_the_key_holds(driver):
    def compiled(given, options):
        arch = given.pop("arch", "sm_90")
        source, how = specialized(
            attention.plan_fwd(*{**tensors(), **given}.values(), options, arch), driver.target
        )
        return str((source.hash(), how))

    given = [dict(other) for other in OTHERS.values()]
    variants = [(one, Options(0.25)) for one in given]
    variants += [({}, Options(**{"scale": 0.25} | one)) for several in OPTIONS.values() for one in several]
    kinds = {}
    with uncompiled(), mock.patch.object(launch_cache, "_plan_and_run") as planned:
        for one, options in variants:
            forward(options, **one)
            kinds.setdefault(planned.call_args.args[2], set()).add(compiled(dict(one), options))
    assert all(len(sources) == 1 for sources in kinds.values())


# A count, which no busy machine changes: it was 440 where each op decided for itself.
def test_python_functions_that_a_block_enters():
    setting = bench_host.setting()
    with torch.inference_mode(), bench_host.stubbed(setting):
        provided = bench_host.providers(setting)
        ours = [bench_host.calls_of(provided[name][0]) for name in bench_host.BLOCKS]
        theirs = bench_host.calls_of(provided["block"][1])
        with bench_host.by_tables():
            ours += [bench_host.calls_of(provided[name][0]) for name in bench_host.BLOCKS]
    assert max(ours) <= 165, ours
    assert theirs >= 100
