"""Apply the parity contract: to the five ops in every data regime, and to whole models block by block."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import derived, ops, reference
from .accelerate import restore
from .accelerate.candidates import blocks_of
from .accelerate.example import Inputs
from .backends import use_backend
from .contract import Check, Report, gemm_libraries, judge, judge_top1
from .regimes import OPS, REGIMES, float64, regimes_of
from .tracing import in_float64, trace

GEMM_OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """One cell of the ops' table: an op on one kind of data in one dtype."""

    op: str
    regime: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, {self.regime}"


def op_cases(dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """Every op in every regime that concerns it, in every dtype."""
    return [Case(op, regime, dtype) for op in OPS for dtype in dtypes for regime in regimes_of(op, dtype)]


def verify_op(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Check:
    """Judge the op, on the backend that it resolves to, by the float64 reference and by torch's own ops."""
    inputs = REGIMES[case.regime].inputs(case.op, case.dtype, seed=seed)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    function = getattr(reference, case.op)
    with torch.no_grad():
        oracle = function(**float64(inputs))
        out = _call_public(case.op, inputs)
        if case.op in GEMM_OPS:
            baselines = [_within(context, function, inputs) for _, context in gemm_libraries(device)]
        else:
            baselines = [function(**inputs)]
    kind = "gemm" if case.op in GEMM_OPS else "op"
    return judge(str(case), out, oracle, baselines, kind=kind, offset_regime="offset" in case.regime)


def _call_public(op: str, inputs: dict[str, Tensor]) -> Tensor:
    if op != "attention":
        return getattr(ops, op)(**inputs)
    rest = {name: tensor for name, tensor in inputs.items() if name not in "qkv"}
    packed = torch.stack([inputs[name] for name in "qkv"], dim=2)
    return ops.attention(packed.flatten(2), packed.shape[3], **rest)


def _within(context: Callable, function: Callable, inputs: dict[str, Tensor]) -> Tensor:
    with context():
        return function(**inputs)


def verify(
    model: nn.Module,
    x: Inputs,
    *,
    backward: bool = False,
    oracle: nn.Module | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Judge a model, block by block and whole, by its own copy in float64 and by torch's own ops.

    Everything runs in evaluation mode: where dropout draws anew each time, there is nothing to compare.

    Args:
        model: a ViT, accelerated or not; left as it was.
        x: images [B, C, H, W], floating, in the model's dtype, at least one; or a mapping of the model's
            keyword arguments.
        backward: judge the gradient of every parameter that requires one too.
        oracle: another implementation of the same model with the same weights, to judge by: it is copied to
            float64 for the truth, and run in the model's dtype for torch's own error. By default the model
            itself as it was before `accelerate`, on the reference ops.
        on_step: called with the name of each run before it starts.

    Returns:
        Rows "embed", one a block by its name, "output" ("output.logits" and so on where the model returns
        several) and "top-1", with ``backward`` a row a parameter, and where the model keeps copies of its
        weights (``accelerate(mode="inference")``) "copies": whether all their bits are the weights' now.

    Raises:
        TypeError: if x is not floating.
        ValueError: if there is nothing to judge: no image, or ``backward`` of a wholly frozen model.
    """
    _check(model, x, backward)
    on_step = on_step or (lambda name: None)
    names = list(blocks_of(model))
    on_step("model")
    own = trace(model, x, names, backward)
    judge_model = restore(copy.deepcopy(model)) if oracle is None else oracle
    baselines = []
    with use_backend("reference"):
        for name, context in gemm_libraries(next(model.parameters()).device):
            on_step(f"torch ({name})")
            with context():
                baselines.append(trace(judge_model, x, names, backward))
        on_step("float64")
        truth = trace(copy.deepcopy(judge_model).double(), in_float64(x), names, backward)

    report = Report()
    for name, out in own.items():
        report.rows.append(judge(name, out, truth[name], [b[name] for b in baselines], kind="model"))
    for name in ("output", "output.logits"):
        if name in own and own[name].ndim == 2:
            logits = [b[name] for b in baselines]
            report.rows.append(judge_top1("top-1", own[name], truth[name], logits))
    report.rows += _judge_copies(model, x)
    return report


def _judge_copies(model: nn.Module, x: Inputs) -> list[Check]:
    """A row for the copies of weights that the model computes with, if any: each beside one made anew."""
    kept = derived.copies_of(model)
    if not kept:
        return []
    derived.refresh(model)
    trace(model, x, [], backward=False)
    anew = derived.copies_of(model)
    again = [key for key in kept if key in anew]
    stale = sum(not kept[key].has_bits_of(anew[key]) for key in again)
    reason = (
        f"{stale} of {len(again)} were of weights before an edit that torch records nowhere, and are anew now"
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [Check("copies", dtype, "bits", ok=not stale, reason=reason if stale else "")]


def _check(model: nn.Module, x: Inputs, backward: bool) -> None:
    tensors = [x] if isinstance(x, Tensor) else [value for value in x.values() if isinstance(value, Tensor)]
    if not any(tensor.is_floating_point() for tensor in tensors):
        found = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise TypeError(f"verify needs floating images, because float64 is the oracle; x is {found}")
    if any(tensor.numel() == 0 for tensor in tensors):
        raise ValueError(f"verify needs at least one image; x has shape {list(tensors[0].shape)}")
    if backward and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("verify(backward=True) needs a parameter that requires a gradient; all are frozen")


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter, in place, so that nothing dropped or swapped goes unseen.

    A fresh ViT hides mistakes: biases are 0, norms 1, LayerScale 1e-5, the class token 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            values = 1.0 + 0.2 * values
        elif parameter.ndim > 1 and name.endswith("weight"):
            values = values / parameter[0].numel() ** 0.5
        else:
            values = 0.2 * values
        parameter.copy_(values)
    return model
