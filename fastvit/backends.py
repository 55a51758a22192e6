"""The one table of backends.

``TABLE`` lists, for each op, its backends in order of preference. A row's ``can_run`` looks at the
call's metadata (shape, stride, dtype, device) and answers None, or the reason why not; "auto" asks
``worth`` too, whether the backend is known to be right and no slower here. ``resolve`` is the only place
where a backend is chosen: a call, `fastvit info` and `fastvit demo` all ask it.

    FASTVIT_BACKEND     "auto" (default), a backend's name, or per op: "attention=triton,patch_embed=auto"
    FASTVIT_DISABLE     "1": every op runs the reference
    FASTVIT_UNMEASURED  "1": "auto" takes every backend that can run, measured or not
    FASTVIT_ARCH        "sm_90", say: answer for a GPU that is absent (gpus.py)
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple, Self

import torch

from . import frames, native_backend, recording, triton_backend
from .asking import Served, is_asking
from .call_facts import exporting
from .errors import BackendUnavailable

logger = logging.getLogger("fastvit")


def _always(*args, **kwargs) -> None:
    return None


class Backend(NamedTuple):
    """One row: a name, and functions of the call that answer None or the reason why not.

    ``can_run``: why it cannot run. ``worth``: why "auto" leaves it, though it can. ``device``: the kind that
    it is made for. ``partial``: named for every op at once, it leaves the calls that it cannot run to "auto".
    """

    name: str
    can_run: Callable[..., str | None]
    worth: Callable[..., str | None] = _always
    device: str | None = None
    partial: bool = False


def _native(op: str) -> tuple[Backend, Backend]:
    """The compiled libraries' rows: "cuda" for GPUs, "cpp" for the CPU."""
    return tuple(
        Backend(
            name,
            functools.partial(native_backend.can_run, op, device),
            functools.partial(native_backend.worth, op, device),
            device,
        )
        for name, device in (("cuda", "cuda"), ("cpp", "cpu"))
    )


_REFERENCE = Backend("reference", _always)

TABLE: dict[str, tuple[Backend, ...]] = {
    "patch_embed": (
        Backend("triton", triton_backend.can_run_patch_embed, triton_backend.worth_patch_embed, "cuda"),
        _REFERENCE,
    ),
    "layer_norm_linear": (*_native("layer_norm_linear"), _REFERENCE),
    "attention": (
        Backend("triton", triton_backend.can_run_attention, triton_backend.worth_attention, "cuda"),
        Backend("cpp", native_backend.can_run_attention, native_backend.worth_attention, "cpu", partial=True),
        _REFERENCE,
    ),
    "linear_residual": (*_native("linear_residual"), _REFERENCE),
    "layer_norm_mlp": (*_native("layer_norm_mlp"), _REFERENCE),
}
NAMES = ("auto", *dict.fromkeys(row.name for rows in TABLE.values() for row in rows))


def _check(name: str, op: str | None = None) -> str:
    if op is not None and op not in TABLE:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(TABLE)}")
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(NAMES)}")
    if op is not None and name != "auto" and name not in [row.name for row in TABLE[op]]:
        rows = ", ".join(row.name for row in TABLE[op])
        raise ValueError(f"{op} has no backend {name!r}; it has {rows}")
    return name


def parse(text: str) -> dict[str, str]:
    """FASTVIT_BACKEND's value as {op: backend}, "*" standing for every op.

    Raises:
        ValueError: for an unknown op or backend.
    """
    requested = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        op, equals, name = part.rpartition("=")
        requested[op.strip() if equals else "*"] = _check(name.strip(), op.strip() if equals else None)
    return requested


# A mistake in the environment is raised by the first op, not by the import.
_environment: dict[str, str] | ValueError
try:
    _environment = parse(os.environ.get("FASTVIT_BACKEND", ""))
except ValueError as error:
    _environment = ValueError(f"FASTVIT_BACKEND: {error}")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


_HINT = "; FASTVIT_UNMEASURED=1 uses it all the same"
_disabled, _unmeasured = _is_set("FASTVIT_DISABLE"), _is_set("FASTVIT_UNMEASURED")

_said: set[tuple[str, str, str]] = set()


class use_backend:
    """Choose the backend inside a ``with`` block, for every op or per op.

        with fastvit.use_backend("reference"): ...
        with fastvit.use_backend(attention="triton"): ...

    A backend named here never falls back: where it cannot run, the op raises ``BackendUnavailable``
    with the reason. Ops that have no backend of that name resolve as "auto", and so do calls of attention
    that "cpp" does not serve unless it is named for attention itself: it is for inference in float32. The
    setting holds for the whole process, and for what a checkpoint whose forward was inside computes again.
    What torch.export, torch.onnx.export and torch.jit.trace make holds torch's own ops, and fastvit's only
    where a backend is named: who runs that imports fastvit first, and ONNX refuses it.

    Raises:
        ValueError: for an unknown op or backend.
    """

    everywhere = True

    def __init__(self, name: str | None = None, **per_op: str) -> None:
        self._entered: list[frames.Frame] = []
        self.requested = {op: _check(backend, op) for op, backend in per_op.items()}
        if name is not None:
            self.requested["*"] = _check(name)

    def __call__(self, function: Callable) -> Callable:
        """As a decorator: the function runs inside a ``with`` block of its own."""
        name, per_op = self.requested.get("*"), {op: n for op, n in self.requested.items() if op != "*"}

        @functools.wraps(function)
        def inside(*args, **kwargs):
            with use_backend(name, **per_op):
                return function(*args, **kwargs)

        return inside

    def __enter__(self) -> Self:
        frame = frames.Frame(self.requested, self.everywhere)
        self._entered.append(frame)
        frames.stack.append(frame)
        return self

    def __exit__(self, *exc_info) -> None:
        # Not simply the last: another thread may have entered since.
        frames.stack.remove(self._entered.pop())


class use_backend_here(use_backend):
    """The same for calls of this thread alone: what one model was told is not for another's."""

    everywhere = False


def requested(op: str) -> str:
    """The backend that the innermost ``use_backend``, else the environment, names for this op."""
    return _asked(op)[0]


def _asked(op: str) -> tuple[str, bool]:
    """That, and whether the op itself was named beside it."""
    held = frames.holding()
    if not held and not _environment:
        return "auto", False
    if isinstance(_environment, ValueError):
        raise _environment
    for asked in (*(frame.requested for frame in reversed(held)), _environment):
        name = asked.get(op) or asked.get("*")
        if name is not None:
            return (name, op in asked) if name in [row.name for row in TABLE[op]] else ("auto", False)
    return "auto", False


def names_a_kernel() -> bool:
    """Whether a backend other than torch's own ops is named for an op."""
    return any(requested(op) not in ("auto", "reference") for op in TABLE)


def kernels_for(device: str) -> dict[str, str]:
    """Each op's backend for "cpu" or "cuda" that serves training too, as ``use_backend`` takes them."""
    made_for = ((op, row) for op, rows in TABLE.items() for row in rows if row.device == device)
    return {op: row.name for op, row in made_for if not row.partial}


def is_automatic() -> bool:
    """Whether a call is resolved by the tables alone, and nobody watches: the same call is then as before."""
    return not (frames.stack or _environment or _unmeasured or recording.active)


def resolve(op: str, *args, **kwargs) -> str:
    """The name of the backend that this call of the op runs on.

    Raises:
        BackendUnavailable: if a backend was named and cannot run here.
    """
    name, itself = _asked(op)
    if _disabled and name not in ("auto", "reference"):
        raise BackendUnavailable(f"{op}: backend {name!r} was asked for, but FASTVIT_DISABLE is set")
    name = "reference" if name == "auto" and (_disabled or exporting()) else name
    for row in TABLE[op]:
        if name not in ("auto", row.name):
            continue
        reason = row.can_run(*args, **kwargs)
        if reason is None and name == "auto":
            reason = _not_worth(row, _HINT, *args, **kwargs)
        if reason is None:
            return _chosen(op, row, *args, **kwargs)
        if row.partial and not itself:
            name = "auto"
        if name != "auto":
            raise BackendUnavailable(f"{op}: backend {name!r} cannot run: {reason}")
        _say_once(op, row.name, reason)
    raise AssertionError(f"{op}: its table has no row that always runs")


def _chosen(op: str, row: Backend, *args, **kwargs) -> str:
    if is_asking():
        if row is not _REFERENCE:
            raise Served
    elif recording.active:
        _record(op, row.name, *args, **kwargs)
    return row.name


def _record(op: str, chosen: str, *args, **kwargs) -> None:
    served = any(row.can_run(*args, **kwargs) is None for row in TABLE[op] if row.name != "reference")
    reason = _why(op, chosen, "", *args, **kwargs)
    for recorder in recording.listeners():
        recorder.add(op, chosen, served, reason)
        if recorder.calls is not None:
            recorder.calls.append((op, args, kwargs))


def _not_worth(row: Backend, hint: str, *args, **kwargs) -> str | None:
    reason = None if _unmeasured else row.worth(*args, **kwargs)
    return None if reason is None else reason + hint


def _say_once(op: str, name: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, name, reason) in _said:
        return
    _said.add((op, name, reason))
    logger.info("%s: not %s: %s", op, name, reason)


def describe(*args, **kwargs) -> list[tuple[str, str, str]]:
    """Rows (op, the backend that a call would run on here, why) for people: `fastvit info` and the demo."""
    rows = []
    for op in TABLE:
        try:
            chosen = resolve(op, *args, **kwargs)
        except BackendUnavailable as error:
            rows.append((op, "unavailable", str(error)))
        else:
            rows.append((op, chosen, _why(op, chosen, _HINT, *args, **kwargs)))
    return rows


def _why(op: str, chosen: str, hint: str, *args, **kwargs) -> str:
    if requested(op) == chosen:
        return "asked for by name"
    if why := "FASTVIT_DISABLE is set" if _disabled else exporting():
        return why
    passed = []
    for row in TABLE[op]:
        if row.name == chosen:
            break
        passed.append((row, row.can_run(*args, **kwargs) or _not_worth(row, hint, *args, **kwargs)))
    here = next((value.device.type for value in args if isinstance(value, torch.Tensor)), None)
    # What is made for another kind of device is worth no word beside what is made for this one.
    telling = [(row, reason) for row, reason in passed if here is None or row.device == here]
    if passed and not telling and chosen != "reference":
        return "FASTVIT_UNMEASURED is set" if _unmeasured else "measured right and no slower here"
    telling = telling or passed
    names_by_reason: dict[str, list[str]] = {}
    for row, reason in telling:
        names_by_reason.setdefault(reason, []).append(row.name)
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    return "; ".join(reasons) or "first in the table"
