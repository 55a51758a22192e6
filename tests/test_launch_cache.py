"""Which launches are repeated without being planned again, and with which arguments."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest
import torch
from launch_kinds import (
    DIM,
    HEADS,
    OPTIONS,
    OTHERS,
    TOKENS,
    base,
    expected,
    forward,
    norm,
    shifted,
    tensors,
    uncompiled,
)
from triton import knobs

from fastvit_benchmarks.no_gpu import no_gpu
from fastvit_kernels import attention, launch_cache, patch_embed_plan, tiles
from fastvit_kernels.attention_options import Options
from fastvit_kernels.launch import Launch


@pytest.fixture(autouse=True)
def fresh():
    launch_cache.forget()
    yield
    launch_cache.forget()


@pytest.fixture
def driver():
    with no_gpu() as driver:
        yield driver


# Interpreted kernels are not compiled: a process of its own, in which they are.
def test_launches_that_triton_compiles():
    file = Path(__file__).with_name("compiled_launches.py")
    how = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", str(file), *how]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 5 passed" in f" {run.stdout.splitlines()[-1]}"


@pytest.mark.parametrize("name", Options._fields)
def test_calls_that_differ_in_an_option_are_of_two_kinds(driver, name):
    with uncompiled() as (planned, repeated):
        kinds = [Options(**{"scale": 0.25} | given) for given in OPTIONS[name]]
        for options in kinds:
            forward(options)
        assert len(planned) == len(kinds) >= 2
        for options in kinds:
            given = tensors()
            fresh = attention.plan_fwd(*given.values(), options, "sm_90")
            forward(options, **given)
            if name == "rope_sin" and options is kinds[1]:  # which the plan copies to be as cos is
                continue
            launch, ran = repeated[-1]
            assert list(ran[9:]) == expected(fresh)
            assert (launch.num_warps, launch.num_stages, launch.grid) == (
                fresh.num_warps,
                fresh.num_stages,
                (ran[0],),
            )


def test_calls_of_other_metadata_are_of_other_kinds(driver):
    kinds = [{"out": shifted(base["out"], 0)}, *OTHERS.values()]
    with uncompiled() as (planned, repeated):
        for given in kinds:
            forward(**given)
        assert len(planned) == len(kinds)
        assert not repeated
        for given in kinds:
            forward(**given)
        assert len(planned) == len(kinds) == len(repeated)


def test_another_device_is_another_kind_and_is_made_current(driver):
    guard = mock.MagicMock()
    with uncompiled() as (planned, repeated), mock.patch("torch.cuda.device", guard):
        driver.get_current_stream = lambda device: 100 + device
        for device in (0, 1, 0, 1):
            with mock.patch.object(torch.Tensor, "get_device", lambda _, device=device: device):
                forward()
    assert len(planned) == 2
    assert [given[3] for _, given in repeated] == [100, 101]
    guard.assert_called_once_with(1)
    guard.return_value.__enter__.assert_called_once_with()


def test_the_stream_is_asked_at_each_call(driver):
    streams = itertools.count()
    driver.get_current_stream = lambda device: next(streams)
    with uncompiled() as (_, repeated):
        for _ in range(4):
            forward()
    assert [given[3] for _, given in repeated] == [0, 1, 2]


@pytest.mark.parametrize("places", [(0, 1), (0, -1), (-1, 0), (-1, -1)])
def test_what_lies_elsewhere_goes_through_triton_each_time(driver, places):
    device = itertools.cycle(places)
    with uncompiled() as (planned, repeated):
        with mock.patch.object(torch.Tensor, "get_device", lambda _: next(device)):
            for _ in range(2):
                forward()
        assert len(planned) == 2
        assert not repeated


def test_what_a_plan_copies_is_copied_each_time(driver):
    table = torch.zeros(DIM, TOKENS).mT
    with uncompiled() as (planned, repeated):
        for _ in range(2):
            forward(Options(0.25, rope_cos=table, rope_sin=table))
        assert len(planned) == 2
        assert not repeated


def test_one_tensor_in_two_places_is_not_taken_for_two(driver):
    one, two = norm(1.0), norm(2.0)
    how = {"scale": 0.25, "qk_norm": "rms_norm"}
    with uncompiled() as (_, repeated):
        forward(Options(**how, q_norm_weight=one, k_norm_weight=one))
        forward(Options(**how, q_norm_weight=one, k_norm_weight=two))
        launch, given = repeated[-1]
        names = launch.kernel.arg_names
        assert given[9 + names.index("q_weight_ptr")] == one.data_ptr()
        assert given[9 + names.index("k_weight_ptr")] == two.data_ptr()


def test_plans_of_several_launches_are_repeated_in_order(driver):
    def plan(images, patch, arch):
        return tuple(patch_embed_plan.sum_rows(images, images[0]) for _ in range(patch[0]))

    images = torch.zeros(4, 8)
    with uncompiled() as (planned, repeated):
        for _ in range(2):
            launch_cache.run(plan, images, (3, 1), "sm_90")
        assert [launch for launch, _ in repeated] == planned
        assert len(planned) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda: mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [print]),
        lambda: mock.patch.object(knobs.runtime.launch_exit_hook, "calls", [print]),
        lambda: mock.patch.object(knobs.runtime, "launch_enter_hook", print),
        lambda: mock.patch.object(knobs.runtime, "add_stages_inspection_hook", print),
        lambda: mock.patch.object(knobs.runtime, "debug", True),
        lambda: mock.patch.dict(knobs.compilation.__dict__, instrumentation_mode="fpsan"),
        lambda: mock.patch.object(attention._attention_fwd_kernel, "pre_run_hooks", [print]),
    ],
    ids=["enter", "exit", "one hook", "stages", "debug", "instrumentation", "pre-run"],
)
def test_who_looks_on_gets_tritons_own_launch(driver, change):
    with uncompiled() as (planned, repeated):
        forward()
        with change():
            forward()
        assert len(planned) == 2
        assert not repeated
        forward()
        assert len(repeated) == 1


def test_what_is_interpreted_or_empty_is_planned_each_time(driver):
    with mock.patch.object(Launch, "__call__", return_value=None) as launched:
        for _ in range(3):
            forward()
    assert launched.call_count == 3


def test_a_grid_that_is_too_large_is_refused_each_time(driver):
    rows = torch.zeros(DIM, dtype=torch.float16)
    wide = {name: rows.expand(2**31, TOKENS, HEADS, DIM) for name in "qkv"}
    for _ in range(2):
        with pytest.raises(ValueError, match="split the batch"):
            forward(**wide)


def test_another_tile_is_planned_anew_and_so_is_the_old_one(driver):
    place = tiles.place("attention_fwd", "sm_90", "half", head_dim=DIM, tokens=TOKENS, load=0)
    entry = tiles.table("sm_90")["attention_fwd"][place]
    with uncompiled() as (planned, repeated):
        forward()
        with tiles.overriding("attention_fwd", "sm_90", place, entry | {"num_warps": 8}):
            forward()
            forward()
        forward()
    assert [launch.num_warps for launch in planned] == [entry["num_warps"], 8, entry["num_warps"]]
    assert [launch.num_warps for launch, _ in repeated] == [8]


def test_only_so_many_kinds_are_kept_and_the_oldest_goes_first(driver):
    with uncompiled() as (planned, _), mock.patch.object(launch_cache, "MOST", 2):
        for tokens in (1, 2, 3, 3, 2, 1):
            forward(**tensors(tokens=tokens))
        assert [launch.args["tokens"] for launch in planned] == [1, 2, 3, 1]
        assert len(launch_cache._prepared) == 2


def test_threads_repeat_each_its_own_call(driver):
    calls, failed = [tensors(tokens=tokens) for tokens in range(1, 9)], []

    def work(first):
        for i in range(200):
            try:
                forward(**calls[(first + i // 2) % len(calls)])
            except Exception as error:
                failed.append(error)

    with uncompiled() as (_, repeated), mock.patch.object(launch_cache, "MOST", 7):
        threads = [Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    fits = {
        given["out"].data_ptr(): attention.plan_fwd(*given.values(), Options(0.25), "sm_90")
        for given in calls
    }
    for launch, given in repeated:
        out = given[9 + launch.kernel.arg_names.index("out_ptr")]
        assert list(given[9:]) == expected(fits[out])
    assert len(repeated) > 100


def test_keys_of_different_plans_differ(driver):
    x, y = torch.zeros(4, 8), torch.zeros(8)
    plans = [patch_embed_plan.sum_rows, lambda *args: patch_embed_plan.sum_rows(*args)]
    with uncompiled() as (planned, _):
        for plan in plans:
            launch_cache.run(plan, x, y)
        assert len(planned) == 2


def test_views_into_one_tensor_lie_as_far_behind_it_as_planned(driver):
    options = Options(0.25)
    packed = [torch.zeros(2, TOKENS, 3 * HEADS * DIM, dtype=torch.float16) for _ in range(2)]
    with uncompiled() as (planned, repeated):
        outs = [attention.attention_packed(qkv, HEADS, options) for qkv in packed]
        assert len(planned) == len(repeated) == 1
    views = packed[1].view(2, TOKENS, 3, HEADS, DIM).unbind(2)
    fresh = attention.plan_fwd(*views, outs[1], None, options, "sm_90")
    assert list(repeated[0][1][9:]) == expected(fresh)
    assert len({view.data_ptr() for view in views}) == 3


def test_the_backward_repeats_both_of_its_launches_with_and_without_sums(driver):
    with uncompiled() as (planned, repeated):
        for fill in (None, 1.0):
            norms = {} if fill is None else {"qk_norm": "layer_norm", "q_norm_weight": norm(fill)}
            for _ in range(2):
                given = {**tensors(), "lse": torch.zeros(1, HEADS, TOKENS)}
                q, k, v, out, lse = given.values()
                options = {"scale": 0.25, **norms, "norm_grads": bool(norms)}
                attention.attention_bwd(torch.zeros_like(out), q, k, v, out, lse, **options)
        assert len(planned) == len(repeated) == 4
    for launch, (_, given) in zip(planned, repeated, strict=True):
        names = launch.kernel.arg_names
        of_sums = given[9 + names.index("sums_ptr")]
        assert (of_sums is None) == (launch.args["sums_ptr"] is None)
        assert given[9 + names.index("OWNER")] == launch.constants["OWNER"]
    sums = {given[9 + launch.kernel.arg_names.index("sums_ptr")] for launch, given in repeated}
    assert len(sums) == 3
