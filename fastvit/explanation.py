"""`explain`: which op of which block runs on which backend, and why; found by a run without data."""

import inspect
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
from .errors import FastvitError
from .fake_run import count_flops, run_without_data
from .gpus import assume_arch
from .recording import Event, Recorder, recording


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
    part: str = ""  # what was run of a model that takes more than images

    def to_json(self) -> str:
        """The rows, the coverage, what is said of the compiler, and what part of the model was run."""
        rows = [asdict(row) for row in self.rows]
        said = {"compiler": self.compiler, "part": self.part}
        return json.dumps({"coverage": self.coverage._asdict(), "rows": rows, **said})

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
        of = f" of {self.part}, which alone runs on images (x: the model's own inputs)" if self.part else ""
        served = f"{self.coverage.blocks:.0%} of the blocks"
        return f"kernels of fastvit can serve {served}{of}{flops}{advice}{compiler}"


def explain(model: nn.Module, x: Inputs | None = None, arch: str | None = None) -> Explanation:
    """Say which backend serves each op of a model, and why, without computing anything.

    Args:
        model: any model; blocks that `accelerate` has not replaced are rows with the reason.
        x: images [B, C, H, W], or a mapping of the model's keyword arguments; by default one image of the
            model's own size. FLOPs are counted only for an x that is given.
        arch: answer for a GPU of this architecture, "sm_90" say, that need not be here.

    Returns:
        A row for each op of each block, and for each module that runs its library's own forward, or that this
        call does not run. Of a model that takes more than images its vision tower alone, without ``x``.

    Raises:
        ValueError: for an unknown ``arch``, or without ``x`` for a model that runs on images in no part.
    """
    load_families()
    with assume_arch(arch):
        runs = [_run("", model, x, arch)] if x is not None else _runs_on_images(model, arch)
    flops = {} if x is None else _flops(model, *as_call(x))
    events = [event for _, found in runs for event in found]
    left = {name: reason for name, module in model.named_modules() if (reason := why_left_alone(module))}
    left |= own_embeddings_of(model) | typed_weights_of(model)
    parts = [name for name, _ in runs]
    left = {name: reason for name, reason in left.items() if any(_is_inside(name, part) for part in parts)}
    blocks = [name for name in blocks_of(model) if any(_is_inside(name, part) for part in parts)]
    rows = [Row(name, "forward", "original", False, reason) for name, reason in left.items()]
    for event in events:
        if event.module not in left:
            row = Row(event.module, event.op or "forward", event.backend, event.accelerated, event.reason)
            rows.append(row)
    reached = {row.module for row in rows}
    not_run = "a call with these inputs does not run it"
    rows += [Row(name, "forward", "none", False, not_run) for name in blocks if name not in reached]
    served = {name for name in blocks if _is_served(name, rows, events)}
    rows = sorted(dict.fromkeys(rows), key=_order(model))
    shares = Coverage(len(served) / len(blocks) if blocks else 0.0, _share(served, flops))
    compiler = "" if arch else _of_the_compiler(model, blocks)
    return Explanation(tuple(rows), shares, compiler, " and ".join(filter(None, parts)))


def _run(name: str, model: nn.Module, x: Inputs, arch: str | None) -> tuple[str, list[Event]]:
    """What happens in a call, with ``name`` before the names of the model's modules."""
    args, kwargs = as_call(x)
    with recording() as recorder, _named(name, model, recorder):
        run_without_data(model, args, kwargs, "cuda" if arch else None, gradients=model.training)
    return name, recorder.events


def _runs_on_images(model: nn.Module, arch: str | None) -> list[tuple[str, list[Event]]]:
    """That of the model, or if it takes more than images of the largest parts that take no more.

    Raises:
        ValueError: if there is none.
    """
    if not blocks_of(model):
        return [_run("", model, example_input(model), arch)]
    why: list[Exception] = []
    found = list(_largest_that_run("", model, arch, why))
    if not found:
        parameters = inspect.signature(model.forward).parameters.values()
        names = ", ".join(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
        message = f"{type(model).__name__} does not run on images alone: pass x, a mapping of {names}"
        raise ValueError(message) from why[0]
    return found


def _largest_that_run(
    name: str, model: nn.Module, arch: str | None, why: list[Exception]
) -> Iterator[tuple[str, list[Event]]]:
    """What a call lacks is known by no other means than the call; why it failed is put into ``why``."""
    try:
        yield _run(name, model, example_input(model), arch)
    except FastvitError:
        raise
    except Exception as error:
        why.append(error)
        for child, module in model.named_children():
            blocks = blocks_of(module)
            if blocks and "" not in blocks:
                yield from _largest_that_run(f"{name}.{child}".lstrip("."), module, arch, why)


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


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


def _is_served(block: str, rows: list[Row], events: list[Event]) -> bool:
    """Whether both halves of a block were run by ops alone, that kernels can serve all."""
    own = [row for row in rows if _is_inside(row.module, block)]
    ops = [event.op for event in events if _is_inside(event.module, block)]
    begun = ops.count("layer_norm_linear") + ops.count("layer_norm_mlp")  # a half begins with its norm
    return "attention" in ops and begun >= 2 and all(row.accelerated for row in own)


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
def _named(prefix: str, model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which of our modules is running, with the prefix before their names."""
    outer: list[str] = []

    def enter(name: str) -> None:
        outer.append(recorder.module)
        recorder.module = name

    def leave(*_: Any) -> None:
        recorder.module = outer.pop()

    handles = []
    for inner, module in hooked_of(model).items():
        name = f"{prefix}.{inner}".strip(".")
        handles.append(module.register_forward_pre_hook(lambda _module, _args, name=name: enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
