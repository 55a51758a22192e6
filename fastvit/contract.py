"""The parity contract: the one place where numbers are judged.

A result is right when it is about as close to a float64 oracle as torch's own fused op in the same dtype on
the same device. Tests, ``fastvit.verify`` and the benchmarks judge by these functions only, and a number
loosened here needs a changelog line with the measurement behind it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal, NamedTuple, get_args

import torch

from fastvit.gemm_libraries import gemm_libraries
from fastvit.verdicts import Check, Report, ratio

__all__ = ["BUDGETS", "Check", "Report", "gemm_libraries", "judge", "judge_saved", "judge_top1"]

Kind = Literal["op", "dq", "gemm", "param_grad", "model"]
HALF = (torch.float16, torch.bfloat16)


class Budget(NamedTuple):
    """Factors on torch's own error; floors in eps of the dtype (float64: in 1) times the answer's size."""

    rms_k: float
    max_k: float
    rms_floor: float
    max_floor: float


BUDGETS = {
    "float32": Budget(1.5, 3.0, 1.0, 1.0),
    "float32, one GEMM library": Budget(2.5, 4.0, 1.0, 1.0),
    "tf32 forward": Budget(1.25, 2.0, 1.0, 1.0),
    "tf32 backward": Budget(1.25, 3.0, 1.0, 1.0),
    "half": Budget(1.25, 2.0, 0.35, 0.75),
    "half dq": Budget(1.25, 3.0, 0.35, 0.75),
    "float64": Budget(0.0, 0.0, 1e-12, 1e-10),
}
OFFSET_RMS_K = 2.0  # float32: right implementations round a large mean differently
MODEL_RMS_K, MODEL_MAX_K = 1.25, 2.5
PARAM_GRAD_RMS, PARAM_GRAD_MAX = 0.75, 1.0  # eps, half precision: torch's own 2.6 to 4.6 are no yardstick
ROW_SLACK = 2.0
SAVED_TOLERANCE = 1e-5


def judge(
    name: str,
    out: torch.Tensor,
    oracle: torch.Tensor,
    baselines: torch.Tensor | Sequence[torch.Tensor] = (),
    *,
    kind: Kind,
    scale: torch.Tensor | None = None,
    backward: bool = False,
    tf32: bool = False,
    offset_regime: bool = False,
    rows: Sequence[int] | None = None,
    floor_only: bool = False,
) -> Check:
    """Judge ``out`` by ``oracle`` (float64, same shape) and by torch's own op in ``out``'s dtype.

    The limit is max(k x torch's error, floor) for rms and max over the tensor and, with twice the slack, for
    the worst row. Before that, ``out`` must be inf, -inf and nan exactly where the oracle cast to its dtype
    is, and finite somewhere. A wrong shape or dtype is a failed check, never an exception; an empty tensor
    passes.

    Args:
        baselines: the result of torch's fused op, or one for each GEMM library, of which the worse counts.
            With none the floor is the limit.
        kind: "op" (attention, patch_embed), "dq" (the query's gradient), "gemm", "param_grad" (an op's
            dweight, dbias, dpos: in half precision under a ceiling as well), or "model" (logits,
            intermediates, and gradients that came through other blocks).
        scale: float64, ``oracle``'s shape: the same product taken with absolute values. It raises the floor
            where the true answer cancels.
        backward: whether the tensor is a gradient, which tf32 alone minds.
        tf32: tf32 dots were asked for, and the baselines used them as well. Only float32 minds.
        offset_regime: the input had a large common offset. Only float32 with ieee dots minds.
        rows: the dimensions that number the rows; all but the last unless given.
        floor_only: the floor is the limit, as for N <= 2.

    Raises:
        ValueError: an unknown ``kind``.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    baselines = _listed(baselines)
    check = Check(name, _name(out.dtype), kind)
    if reason := _misfit(out, oracle, baselines, scale) or _unlike_non_finite(out, oracle):
        return replace(check, reason=reason)
    if out.numel() == 0:
        return replace(check, ok=True, reason="empty")

    truth = _by_row(oracle, rows)
    keep = _by_row(oracle.to(out.dtype).isfinite(), rows)
    if not keep.any():
        return replace(check, reason="nothing finite to judge")
    size, row_sizes = _sizes(truth, truth if scale is None else _by_row(scale.to(truth), rows), keep)
    ours, *torchs = (_errors(_by_row(t.to(truth), rows), truth, keep, row_sizes) for t in (out, *baselines))
    worst = _Errors(*map(max, zip(*torchs, strict=True))) if torchs else None

    lone = len(baselines) == 1 and len(gemm_libraries(out.device)) == 1
    budget = _budget(out.dtype, kind, backward=backward, tf32=tf32, offset=offset_regime, lone=lone)
    eps = 1.0 if out.dtype == torch.float64 else torch.finfo(out.dtype).eps
    limit = _scaled(size, eps * budget.rms_floor, eps * budget.max_floor)
    if worst and budget.rms_k and not floor_only:
        limit = _Errors(*map(max, limit, _scaled(worst, budget.rms_k, budget.max_k)))
    if kind == "param_grad" and out.dtype in HALF:
        limit = _Errors(*map(min, limit, _scaled(size, eps * PARAM_GRAD_RMS, eps * PARAM_GRAD_MAX)))
    return _verdict(check, ours, worst or _Errors(*[math.nan] * 4), limit)


def judge_saved(
    name: str, out: torch.Tensor, oracle: torch.Tensor, *, scale: torch.Tensor | None = None
) -> Check:
    """Judge a saved mean, rstd or LSE: float32 in every dtype, each element within 1e-5 of ``oracle``.

    Relative to the larger of |oracle| and ``scale`` (float64, same shape): a mean or an LSE near zero is what
    was left of a cancellation, and is measured by what cancelled (for a mean, mean |x|).
    """
    check = Check(name, _name(out.dtype), "saved")
    if out.dtype != torch.float32:
        return replace(check, reason="a saved statistic is float32 in every dtype")
    if reason := _misfit(out, oracle, [], scale) or _unlike_non_finite(out, oracle):
        return replace(check, reason=reason)
    size = oracle.abs() if scale is None else torch.maximum(oracle.abs(), scale.to(oracle))
    error = (out.to(oracle) - oracle).abs()
    relative = torch.where(error > 0, error / size, 0.0)[oracle.to(out.dtype).isfinite()]
    e_max = relative.max().item() if relative.numel() else 0.0
    reason = "" if e_max <= SAVED_TOLERANCE else f"max {e_max:.2e} over {SAVED_TOLERANCE:.0e}, relative"
    return replace(check, e_max=e_max, limit_max=SAVED_TOLERANCE, ok=not reason, reason=reason)


def judge_top1(
    name: str, out: torch.Tensor, oracle: torch.Tensor, baselines: torch.Tensor | Sequence[torch.Tensor]
) -> Check:
    """Judge the top-1 class of logits [..., classes]: the oracle's, unless its margin is under 2 e_max.

    e_max is the smaller of our error and torch's, because ours alone would excuse every flip that it causes.
    The check's max is the widest margin lost, and its limit 2 e_max.
    """
    baselines = _listed(baselines)
    check = Check(name, _name(out.dtype), "top1")
    if reason := _misfit(out, oracle, baselines, None) or _unlike_non_finite(out, oracle):
        return replace(check, reason=reason)
    flipped = out.argmax(-1).to(oracle.device) != oracle.argmax(-1)
    if not flipped.any():
        return replace(check, ok=True)
    keep = oracle.to(out.dtype).isfinite()
    ours, *torchs = (_errors(t.to(oracle), oracle, keep, oracle.new_ones(())).max for t in (out, *baselines))
    limit = 2 * min([ours, max(torchs)] if torchs else [ours])
    first, second = oracle[flipped].topk(2).values.unbind(-1)
    lost = (first - second).max().item()
    reason = "" if lost < limit else f"a top-1 margin of {lost:.2e} was lost, and only {limit:.2e} is excused"
    return replace(check, e_max=lost, limit_max=limit, ok=not reason, reason=reason)


class _Errors(NamedTuple):
    """Over the tensor: rms and max. Of the worst row: rms, plain and as a share of that row's size."""

    rms: float
    max: float
    row: float
    share: float


def _budget(
    dtype: torch.dtype, kind: Kind, *, backward: bool, tf32: bool, offset: bool, lone: bool
) -> Budget:
    if dtype == torch.float64:
        return BUDGETS["float64"]
    if dtype in HALF:
        budget = BUDGETS["half dq" if kind == "dq" else "half"]
    elif tf32:
        budget = BUDGETS["tf32 backward" if backward or kind in ("dq", "param_grad") else "tf32 forward"]
    else:
        lone_gemm = lone and kind in ("gemm", "param_grad")
        budget = BUDGETS["float32, one GEMM library" if lone_gemm else "float32"]
        budget = budget._replace(rms_k=max(budget.rms_k, OFFSET_RMS_K)) if offset else budget
    return budget._replace(rms_k=MODEL_RMS_K, max_k=MODEL_MAX_K) if kind == "model" else budget


def _misfit(out: torch.Tensor, oracle: torch.Tensor, baselines: list, scale: torch.Tensor | None) -> str:
    """Why these tensors cannot be compared, or nothing."""
    if out.dtype not in (torch.float64, torch.float32, *HALF):
        return f"{_name(out.dtype)} is no dtype of the contract"
    others = [("oracle", oracle, torch.float64), *(("baseline", t, out.dtype) for t in baselines)]
    for role, other, dtype in others if scale is None else [*others, ("scale", scale, torch.float64)]:
        if other.dtype != dtype:
            return f"the {role} is {_name(other.dtype)}, not {_name(dtype)}"
        if other.shape != out.shape:
            return f"shape {list(out.shape)}, and the {role} has {list(other.shape)}"
    return ""


def _unlike_non_finite(out: torch.Tensor, oracle: torch.Tensor) -> str:
    """Where inf, -inf and nan are not those of the oracle cast to the dtype, or nothing."""
    out, expected = out.to(oracle.device), oracle.to(out.dtype)
    unlike = torch.zeros_like(out, dtype=torch.bool)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        unlike |= test(out) != test(expected)
    if not unlike.any():
        return ""
    at = tuple(unlike.nonzero()[0].tolist())
    values = f"{out[at].item()} for {expected[at].item()} at {list(at)}"
    return f"{int(unlike.sum())} values not finite as the oracle's are, the first {values}"


def _by_row(t: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
    """The tensor as [rows, elements of a row]."""
    rows = tuple(range(t.dim() - 1) if rows is None else rows)
    count = math.prod(t.shape[dim] for dim in rows)
    return t.detach().movedim(rows, tuple(range(len(rows)))).reshape(count, -1)


def _row_rms(t: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (t.square().where(keep, 0.0).sum(-1) / keep.sum(-1).clamp(min=1)).sqrt()


def _sizes(truth: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor) -> tuple[_Errors, torch.Tensor]:
    """How large the answer is, in the terms of each error, and how large each row is [rows].

    A row smaller than the typical one counts as typical: the noise of a vanishing row is no measure.
    """
    scale = scale.where(scale.isfinite(), truth)
    row_sizes = torch.maximum(_row_rms(truth, keep), _row_rms(scale, keep))
    some = row_sizes[row_sizes > 0]
    row_sizes = row_sizes.clamp(min=some.median()) if some.numel() else row_sizes
    none = torch.zeros_like(truth)
    larger = map(max, _errors(truth, none, keep, row_sizes), _errors(scale, none, keep, row_sizes))
    return _Errors(*larger)._replace(share=1.0), row_sizes


def _errors(value: torch.Tensor, truth: torch.Tensor, keep: torch.Tensor, row_sizes: torch.Tensor) -> _Errors:
    """Errors over the elements in ``keep``. A baseline earns nothing where it is not finite."""
    error = (value - truth).where(keep & value.isfinite(), 0.0)
    rms = _row_rms(error.reshape(-1), keep.reshape(-1))
    by_row = _row_rms(error, keep)
    share = torch.where(by_row > 0, by_row / row_sizes, 0.0)
    return _Errors(rms.item(), error.abs().max().item(), by_row.max().item(), share.max().item())


def _scaled(errors: _Errors, rms: float, most: float) -> _Errors:
    slack = ROW_SLACK * rms
    return _Errors(rms * errors.rms, most * errors.max, slack * errors.row, slack * errors.share)


def _verdict(check: Check, ours: _Errors, torchs: _Errors, limit: _Errors) -> Check:
    row = max(("row", "share"), key=lambda kind: ratio(getattr(ours, kind), getattr(limit, kind)))
    measured = [[getattr(errors, kind) for errors in (ours, torchs, limit)] for kind in ("rms", "max", row)]
    over = [
        f"{what} {error:.2e} over {most:.2e}"
        for what, (error, _, most) in zip(("rms", "max", "worst row"), measured, strict=True)
        if not error <= most
    ]
    numbers = chain.from_iterable(measured)
    return Check(check.name, check.dtype, check.kind, *numbers, ok=not over, reason="; ".join(over))


def _listed(baselines: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [baselines] if isinstance(baselines, torch.Tensor) else list(baselines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
