"""Apply the parity contract: to the five ops in every data regime, and to whole models block by block."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, reference
from .backends import use_backend
from .contract import Check, Report, gemm_libraries, judge, judge_top1
from .regimes import OPS, REGIMES, float64, regimes_of

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
    x: Tensor,
    *,
    backward: bool = False,
    oracle: nn.Module | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Judge a model, block by block and whole, by its own copy in float64 and by torch's own ops.

    Everything runs in evaluation mode: where dropout draws anew each time, there is nothing to compare.

    Args:
        model: a ViT whose blocks are ``model.blocks``; left as it was.
        x: images [B, C, H, W], floating, in the model's dtype, at least one.
        backward: judge the gradient of every parameter that requires one too.
        oracle: another implementation of the same model with the same weights, to judge by: it is copied to
            float64 for the truth, and run in the model's dtype for torch's own error. By default the model
            itself, on the reference ops.
        on_step: called with the name of each run before it starts.

    Returns:
        Rows "embed", "blocks.0" ..., "output" and "top-1", and with ``backward`` a row a parameter.

    Raises:
        TypeError: if x is not floating.
        ValueError: if there is nothing to judge: no image, or ``backward`` of a wholly frozen model.
    """
    if not x.is_floating_point():
        raise TypeError(f"verify needs floating images, because float64 is the oracle; x is {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"verify needs at least one image; x has shape {list(x.shape)}")
    if backward and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("verify(backward=True) needs a parameter that requires a gradient; all are frozen")
    on_step = on_step or (lambda name: None)
    on_step("model")
    own = _trace(model, x, backward)
    judge_model = model if oracle is None else oracle
    baselines = []
    with use_backend("reference"):
        for name, context in gemm_libraries(x.device):
            on_step(f"torch ({name})")
            with context():
                baselines.append(_trace(judge_model, x, backward))
        on_step("float64")
        truth = _trace(copy.deepcopy(judge_model).double(), x.double(), backward)

    report = Report()
    for name, out in own.items():
        report.rows.append(judge(name, out, truth[name], [b[name] for b in baselines], kind="model"))
    if own["output"].ndim == 2:
        logits = [b["output"] for b in baselines]
        report.rows.append(judge_top1("top-1", own["output"], truth["output"], logits))
    return report


def _trace(model: nn.Module, x: Tensor, backward: bool) -> dict[str, Tensor]:
    """Outputs by the name of what made them, and gradients by the parameter's name."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.set_grad_enabled(backward), _evaluating(model), _recorded(model) as values:
        values["output"] = output = model(x)
    if backward:
        # Not all ones: a gradient whose rows all agree hides a transposition.
        weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64, device=x.device)
        grad = weights.view_as(output).to(output.dtype)
        grads = torch.autograd.grad(output, list(parameters.values()), grad, allow_unused=True)
        # A gradient that was lost is zero, and is judged: left out, it would go unseen.
        for (name, parameter), gradient in zip(parameters.items(), grads, strict=True):
            values[f"grad {name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return {name: value.detach() for name, value in values.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    blocks = list(getattr(model, "blocks", []))

    def record(name: str, tensor: Tensor) -> None:
        values[name] = tensor

    handles = [
        block.register_forward_hook(lambda _module, _args, out, name=f"blocks.{i}": record(name, out))
        for i, block in enumerate(blocks)
    ]
    if blocks:
        handles.append(blocks[0].register_forward_pre_hook(lambda _module, args: record("embed", args[0])))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


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
