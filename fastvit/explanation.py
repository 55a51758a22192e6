"""`explain`: which op of which block runs on which backend, and why; found by a run without data."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import nn

from . import measurements, native_backend
from .accelerate.candidates import blocks_of, hooked_of, own_embeddings_of, typed_weights_of, why_left_alone
from .accelerate.example import Inputs, as_call, example_input
from .accelerate.registry import load_families
from .backends import use_backend
from .fake_run import count_flops, run_without_data
from .gpus import assume_arch
from .recording import Recorder, recording


@dataclass(frozen=True)
class Row:
    """An op of a module, or with ``op`` "forward" a module that runs its library's own forward.

    ``accelerated``: one of our kernels can serve it. ``backend``: what `auto` takes, by ``reason``.
    """

    module: str
    op: str
    backend: str
    accelerated: bool
    reason: str


class Coverage(NamedTuple):
    """The share of blocks whose every op a kernel of ours can serve, and of the model's FLOPs in them."""

    blocks: float
    flops: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: print it, or read its rows."""

    rows: tuple[Row, ...]
    coverage: Coverage
    compiler: str = ""  # what was measured of torch.compile over such a model, if it loses

    def to_json(self) -> str:
        """The rows, the coverage and what is said of the compiler."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"coverage": self.coverage._asdict(), "rows": rows, "compiler": self.compiler})

    def __str__(self) -> str:
        lines = [("module", "op", "backend", "reason"), *((*key, reason) for key, reason in self._grouped())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return f"{table}\n{self._summary()}"

    def __rich__(self):
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table("module", "op", "backend", "reason", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        table.caption = self._summary()
        for key, reason in self._grouped():
            table.add_row(*map(Text, (*key, reason)))
        return table

    def _grouped(self) -> Iterator[tuple[tuple[str, str, str], str]]:
        """Blocks that run alike as one line: "blocks.0 to blocks.11"."""
        groups: dict[tuple, list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.backend, row.reason), []).append(row.module)
        for (op, backend, reason), modules in groups.items():
            first, last = modules[0] or "the model", modules[-1]
            named = first if len(modules) == 1 else f"{first} to {last} ({len(modules)})"
            yield (named, op, backend), reason

    def _summary(self) -> str:
        flops = "" if self.coverage.flops is None else f", {self.coverage.flops:.0%} of the FLOPs"
        unmeasured = any("not measured" in row.reason for row in self.rows)
        advice = "; `fastvit tune` measures what was not measured here" if unmeasured else ""
        compiler = f"; {self.compiler}" if self.compiler else ""
        return (
            f"kernels of fastvit can serve {self.coverage.blocks:.0%} of the blocks{flops}{advice}{compiler}"
        )


def explain(model: nn.Module, x: Inputs | None = None, arch: str | None = None) -> Explanation:
    """Say which backend serves each op of a model, and why, without computing anything.

    Args:
        model: any model; blocks that `accelerate` has not replaced are rows with the reason.
        x: images [B, C, H, W], or a mapping of the model's keyword arguments; by default one image of the
            model's own size. FLOPs are counted only for an x that is given.
        arch: answer for a GPU of this architecture, "sm_90" say, that need not be here.

    Raises:
        ValueError: for an unknown ``arch``, or a model whose image size cannot be found without ``x``.
    """
    load_families()
    args, kwargs = as_call(example_input(model) if x is None else x)
    with assume_arch(arch), recording() as recorder, _named(model, recorder):
        run_without_data(model, args, kwargs, "cuda" if arch else None, gradients=model.training)
    flops = {} if x is None else _flops(model, args, kwargs)
    left = {name: reason for name, module in model.named_modules() if (reason := why_left_alone(module))}
    left |= own_embeddings_of(model) | typed_weights_of(model)
    rows = [Row(name, "forward", "original", False, reason) for name, reason in left.items()]
    for event in recorder.events:
        if event.module in left:
            continue
        rows.append(Row(event.module, event.op or "forward", event.backend, event.accelerated, event.reason))
    rows = list(dict.fromkeys(rows))
    blocks = list(blocks_of(model))
    served = {name for name in blocks if _is_served(name, rows)}
    shares = Coverage(len(served) / len(blocks) if blocks else 0.0, _share(served, flops))
    compiler = "" if arch else _of_the_compiler(model, blocks)
    return Explanation(tuple(sorted(rows, key=_order(model))), shares, compiler)


def _of_the_compiler(model: nn.Module, blocks: list[str]) -> str:
    """A word where torch.compile was measured to be slower over such a model than over the original."""
    weights = (p for name in blocks for p in model.get_submodule(name).parameters() if p.ndim == 2)
    weight = next(weights, None)
    if weight is None or weight.device.type not in ("cpu", "cuda"):
        return ""
    dtype = str(weight.dtype).removeprefix("torch.")
    asked = ("model", native_backend.machine_name(weight.device.type), dtype, ("fwd",), "compiled")
    said = measurements.refusal(*asked, {"width": weight.shape[-1]})
    lost = said is not None and said.startswith("measured")
    return f"torch.compile is faster over the original model: over this one {said}" if lost else ""


def _is_served(block: str, rows: list[Row]) -> bool:
    own = [row for row in rows if row.module == block or row.module.startswith(f"{block}.")]
    return bool(own) and all(row.accelerated for row in own)


def _share(served: set[str], flops: dict[str, int]) -> float | None:
    total = flops.get("Global", 0)
    inside = sum(count for name, count in flops.items() if name.partition(".")[2] in served)
    return inside / total if total else None


def _order(model: nn.Module):
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return lambda row: position.get(row.module, -1)


def _flops(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, int]:
    """FLOPs by the names of modules, behind the model's class, and of all as "Global"."""
    with use_backend("reference"):
        return count_flops(model, args, kwargs)


@contextmanager
def _named(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which of our modules is running."""
    outer: list[str] = []

    def enter(name: str) -> None:
        outer.append(recorder.module)
        recorder.module = name

    def leave(*_: Any) -> None:
        recorder.module = outer.pop()

    handles = []
    for name, module in hooked_of(model).items():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, name=name: enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
