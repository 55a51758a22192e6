"""The contract holds its numbers: each limit is met from within, and crossed by the next step."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from fastvit import contract
from fastvit.contract import Check, Report, judge, judge_saved, judge_top1
from fastvit.errors import ParityError

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
STEPS = 16  # torch's error in the tables below, in eps
LIMITS = [
    # dtype, kind, keywords, rms k, max k
    (FP32, "op", {}, 1.5, 3),
    (FP32, "dq", {}, 1.5, 3),
    (FP32, "gemm", {}, 1.5, 3),
    (FP32, "param_grad", {}, 1.5, 3),
    (FP32, "op", {"offset_regime": True}, 2, 3),
    (FP32, "gemm", {"offset_regime": True}, 2, 3),
    (FP32, "op", {"tf32": True}, 1.25, 2),
    (FP32, "gemm", {"tf32": True, "offset_regime": True}, 1.25, 2),
    (FP32, "op", {"tf32": True, "backward": True}, 1.25, 3),
    (FP32, "dq", {"tf32": True}, 1.25, 3),
    (FP32, "model", {}, 1.25, 2.5),
    (FP32, "model", {"offset_regime": True}, 1.25, 2.5),
    *((dtype, kind, {}, 1.25, 2) for dtype in (FP16, BF16) for kind in ("op", "gemm")),
    *((dtype, "op", {"backward": True, "offset_regime": True}, 1.25, 2) for dtype in (FP16, BF16)),
    *((dtype, "dq", {}, 1.25, 3) for dtype in (FP16, BF16)),
    *((dtype, "model", {}, 1.25, 2.5) for dtype in (FP16, BF16)),
]


def _ones_but(dtype: torch.dtype, steps: float, spike: bool = False) -> torch.Tensor:
    """Ones [8, 64] that are off by ``steps`` eps: all, or the last alone."""
    off = torch.zeros(8, 64, dtype=FP64)
    off[(-1, -1) if spike else ...] = steps * torch.finfo(dtype).eps
    return (1 + off).to(dtype)


@pytest.mark.parametrize(("dtype", "kind", "keywords", "rms_k", "max_k"), LIMITS, ids=str)
@pytest.mark.parametrize("spike", [False, True], ids=["rms", "max"])
def test_the_ratio_to_torchs_error(dtype, kind, keywords, rms_k, max_k, spike):
    oracle, baseline = torch.ones(8, 64, dtype=FP64), _ones_but(dtype, STEPS)
    most = STEPS * (max_k if spike else rms_k)
    within, beyond = (
        judge("x", _ones_but(dtype, steps, spike), oracle, baseline, kind=kind, **keywords)
        for steps in (most, most + 1)
    )
    assert within.ok, within
    assert not beyond.ok, beyond


@pytest.mark.parametrize(
    ("kind", "rms_k", "max_k"), [("gemm", 2.5, 4), ("param_grad", 2.5, 4), ("op", 1.5, 3), ("dq", 1.5, 3)]
)
def test_the_ratio_where_torch_has_one_gemm_library(monkeypatch, kind, rms_k, max_k):
    monkeypatch.setattr(contract, "gemm_libraries", lambda device: [("default", None)])
    test_the_ratio_to_torchs_error(FP32, kind, {}, rms_k, max_k, spike=False)
    test_the_ratio_to_torchs_error(FP32, kind, {}, rms_k, max_k, spike=True)


FLOORS = [(FP32, 1, 1), (FP16, 0.35, 0.75), (BF16, 0.35, 0.75), (FP64, 1e-12, 1e-10)]


@pytest.mark.parametrize(("dtype", "rms", "most"), FLOORS, ids=str)
@pytest.mark.parametrize("spike", [False, True], ids=["rms", "max"])
@pytest.mark.parametrize("size", [1.0, 64.0], ids=["answer", "scale"])
def test_the_floor_is_relative_to_the_answer_or_what_cancelled_in_it(dtype, rms, most, spike, size):
    unit = 1.0 if dtype == FP64 else torch.finfo(dtype).eps
    ones = torch.ones(8, 4096, dtype=FP64)
    for factor, passes in ((0.99, True), (1.02, False)):
        oracle = ones.clone()
        oracle[(-1, -1) if spike else ...] -= factor * size * unit * (most if spike else rms)
        scale = None if size == 1 else size * ones
        check = judge("x", ones.to(dtype), oracle, kind="op", scale=scale, floor_only=True)
        assert check.ok is passes, check


def test_floor_only_takes_no_credit_from_torchs_error():
    out, oracle = _ones_but(FP32, 2), torch.ones(8, 64, dtype=FP64)
    assert judge("x", out, oracle, _ones_but(FP32, STEPS), kind="op").ok
    assert not judge("x", out, oracle, _ones_but(FP32, STEPS), kind="op", floor_only=True).ok


def test_the_worse_of_torchs_libraries_counts_and_a_lone_one_on_a_cpu_earns_no_slack():
    out, oracle = _ones_but(FP32, 20), torch.ones(8, 64, dtype=FP64)
    good, bad = _ones_but(FP32, 10), _ones_but(FP32, STEPS)
    assert judge("x", out, oracle, [good, bad], kind="gemm").ok
    assert not judge("x", out, oracle, [good], kind="gemm").ok


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_a_parameter_gradient_in_half_precision_has_a_ceiling_whatever_torchs_error(dtype):
    out, torchs = _ones_but(dtype, 0), _ones_but(dtype, 4)
    for factor, passes in ((0.74, True), (0.76, False)):
        oracle = torch.ones(8, 64, dtype=FP64) - factor * torch.finfo(dtype).eps
        assert judge("dweight", out, oracle, torchs, kind="param_grad").ok is passes
        assert judge("dx", out, oracle, torchs, kind="gemm").ok


def test_one_bad_row_is_seen_where_rms_and_max_are_not():
    oracle = torch.ones(200, 64, dtype=FP64)
    baseline, out = oracle.clone(), oracle.clone()
    eps = torch.finfo(FP32).eps
    baseline += 8 * eps
    baseline[:, 0] += 56 * eps
    out += 8 * eps
    out[-1] = 1 + 40 * eps
    check = judge("x", out.float(), oracle, baseline.float(), kind="op")
    assert check.e_rms < check.limit_rms
    assert check.e_max < check.limit_max
    assert check.reason.startswith("worst row")


def test_a_bad_row_is_seen_beside_one_a_hundred_times_its_size():
    size = torch.ones(16, 1, dtype=FP64)
    size[0] = 128
    oracle = size.expand(16, 64)
    out = oracle * _ones_but(FP32, STEPS)[0]
    baseline = out.clone()
    out[-1] = _ones_but(FP32, 4 * STEPS)[0]
    check = judge("x", out.float(), oracle, baseline.float(), kind="op")
    assert check.reason.startswith("worst row")


def test_rows_can_be_numbered_by_any_dimensions():
    oracle = torch.ones(64, 200, dtype=FP64)
    out = oracle.float()
    out[:, -1] += 1e-6
    by_column = judge("x", out, oracle, kind="op", rows=[1])
    assert by_column.e_row == pytest.approx(1e-6, rel=0.1)
    assert judge("x", out, oracle, kind="op").e_row < 1e-7
    assert judge("x", out.sum(), oracle.sum(), kind="op").e_row < 1e-2


INF, NAN = math.inf, math.nan
NON_FINITE = [
    # dtype, value in the result, in the oracle, accepted
    (FP32, NAN, NAN, True),
    (FP32, INF, INF, True),
    (FP32, NAN, 1.0, False),
    (FP32, 1.0, NAN, False),
    (FP32, NAN, INF, False),
    (FP32, -INF, INF, False),
    (FP16, INF, 1e5, True),
    (FP16, 65504.0, 1e5, False),
    (FP16, -INF, 1e5, False),
    (BF16, 99840.0, 1e5, True),
]


@pytest.mark.parametrize(("dtype", "value", "truth", "accepted"), NON_FINITE, ids=str)
def test_finite_first(dtype, value, truth, accepted):
    oracle = torch.ones(4, 8, dtype=FP64)
    out = oracle.to(dtype)
    out[1, 2], oracle[1, 2] = value, truth
    # That torch's op makes the same mistake excuses nothing.
    check = judge("x", out, oracle, out.clone(), kind="op")
    assert check.ok is accepted, check
    assert accepted or "[1, 2]" in check.reason


def test_nan_never_equals_nan():
    nan = torch.full((4, 8), NAN)
    assert not judge("x", nan, nan.double(), nan, kind="op").ok


def test_a_baseline_earns_nothing_where_it_is_not_finite():
    oracle = torch.ones(4, 8, dtype=FP64)
    baseline = oracle.float()
    baseline[0] = INF
    out = oracle.float()
    out[0, 0] += 1e-3
    assert not judge("x", out, oracle, baseline, kind="op").ok


MISFITS = {
    "the shape is not the oracle's": (torch.ones(2, 3), torch.ones(3, 2, dtype=FP64), []),
    "a shape that would broadcast": (torch.ones(2, 3), torch.ones(1, 3, dtype=FP64), []),
    "the oracle is not float64": (torch.ones(2), torch.ones(2), []),
    "the baseline has another dtype": (torch.ones(2), torch.ones(2, dtype=FP64), [torch.ones(2, dtype=BF16)]),
    "the baseline has another shape": (torch.ones(2), torch.ones(2, dtype=FP64), [torch.ones(2, 1)]),
    "the result is of integers": (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=FP64), []),
    "empty, of another shape": (torch.ones(0, 3), torch.ones(0, 4, dtype=FP64), []),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_cannot_be_compared_is_a_failed_check(misfit):
    out, oracle, baselines = MISFITS[misfit]
    check = judge("x", out, oracle, baselines, kind="op")
    assert not check.ok
    assert check.reason
    assert check.excess == INF


def test_an_empty_batch_passes():
    assert judge("x", torch.ones(0, 3), torch.ones(0, 3, dtype=FP64), torch.ones(0, 3), kind="op").ok


def test_an_unknown_kind_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="param_grad"):
        judge("x", torch.ones(2), torch.ones(2, dtype=FP64), kind="grad")


def test_saved_statistics_are_float32_within_1e_5():
    oracle = torch.tensor([2.0, -INF, 1e-9], dtype=FP64)
    scale = torch.ones(3, dtype=FP64)
    assert judge_saved("lse", oracle.float(), oracle).ok
    assert judge_saved("mean", (oracle + 9e-6).float(), oracle, scale=scale).ok
    assert not judge_saved("mean", (oracle + 9e-6).float(), oracle).ok
    assert not judge_saved("mean", (oracle + 3e-5).float(), oracle, scale=scale).ok
    assert not judge_saved("lse", oracle.nan_to_num(neginf=-1e30).float(), oracle).ok
    assert not judge_saved("lse", oracle.bfloat16(), oracle).ok
    assert judge_saved("lse", torch.ones(0), torch.ones(0, dtype=FP64)).ok


def test_top1_may_differ_only_where_the_margin_is_lost_in_torchs_error_too():
    oracle = torch.tensor([[1.0, 1.1, 0.0]], dtype=FP64)
    flipped = torch.tensor([[1.1, 1.0, 0.0]])
    close, far = (oracle.float() + error for error in (0.04, 0.06))
    assert judge_top1("top-1", close, oracle, [close]).ok
    assert judge_top1("top-1", flipped, oracle, [close, far]).ok
    assert not judge_top1("top-1", flipped, oracle, close).ok
    assert not judge_top1("top-1", flipped * NAN, oracle, far).ok


@pytest.fixture()
def report() -> Report:
    oracle = torch.ones(8, 64, dtype=FP64)
    bad = [judge(f"off by {steps}", _ones_but(FP32, steps), oracle, kind="op") for steps in (2, 4)]
    misfit = judge("shape", torch.ones(2), oracle, kind="gemm")
    return Report([judge("right", oracle.float(), oracle, kind="op"), *bad, misfit])


def test_a_report_raises_with_the_worst_first(report):
    with pytest.raises(ParityError) as raised:
        report.raise_if_failed()
    title, *lines = str(raised.value).splitlines()
    assert title == "3 of 4 checks failed"
    assert [line.split(" [")[0] for line in lines] == ["shape", "off by 4", "off by 2"]
    Report(report.rows[:1]).raise_if_failed()


def test_an_empty_report_is_not_ok():
    assert not Report().ok
    with pytest.raises(ParityError, match="nothing was judged"):
        Report().raise_if_failed()


def test_a_report_is_a_table_and_strict_json(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), shown := console.export_text()):
        assert all(row.name in text for row in report.rows)
    assert shown.count("FAILED") == 3
    assert "shape [2], and the oracle has [8, 64]" in str(report)
    rows = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert [row["ok"] for row in rows] == [True, False, False, False]
    assert rows[3]["e_rms"] == "nan"


def test_a_check_cannot_be_edited():
    with pytest.raises(AttributeError):
        Check("x", "float32", "op").ok = True
