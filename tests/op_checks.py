"""How an op is held to its plain statement: exactly in float64, by the contract in every other dtype.

Each check raises ``AssertionError``. They take the op as a function, so that mutants can fail them.
"""

from collections.abc import Callable, Sequence
from itertools import product

import plain_ops
import pytest
import torch
from op_cases import Call, float64, tensors

from fastvit import ops
from fastvit.contract import HALF, gemm_libraries, judge

GEMM_OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def equal_in_float64(op: str, call: Call, function: Callable | None = None) -> None:
    """The op and its plain statement are one function, and what the op returns is contiguous."""
    out = (function or getattr(ops, op))(**call)
    torch.testing.assert_close(out, getattr(plain_ops, op)(**call), **TIGHT)
    assert out.is_contiguous()


def within_contract(op: str, call: Call, function: Callable | None = None, **how: bool) -> None:
    """The op's error is in proportion to that of torch's own ops on the same numbers.

    The oracle is the plain statement in float64 and not the reference, because the reference is on trial.
    """
    with torch.no_grad():
        out = (function or getattr(ops, op))(**call)
        oracle = getattr(plain_ops, op)(**float64(call))
        baselines = [_plain_under(context, op, call) for context in _libraries(op, call)]
    kind = "gemm" if op in GEMM_OPS else "op"
    check = judge(op, out, oracle, baselines, kind=kind, scale=_attention_scale(call), **how)
    assert check.ok, check
    assert out.is_contiguous()


def gradients_within_contract(
    op: str,
    calls: Call | Sequence[Call],
    grad: Callable,
    *,
    without: Sequence[str] = (),
    through: Sequence[str] = (),
    **how: bool,
) -> None:
    """So is the error of each gradient, ``grad(out)`` being the gradient of the output.

    Args:
        calls: of several, gradients are judged together: a few elements do not tell how large an error is.
        without: what the op gives no gradient to.
        through: parameters whose gradient came through other products of the op, where, as for whole
            models, torch's own error in half precision is the yardstick.
    """
    calls = [calls] if isinstance(calls, dict) else calls
    plain = getattr(plain_ops, op)
    dtype = next(iter(tensors(calls[0]).values())).dtype
    how_given = {"grad": grad, "dtype": dtype, "without": without}
    ours = _together(getattr(ops, op), calls, **how_given)
    oracle = _together(plain, [float64(call) for call in calls], **how_given)
    baselines = []
    for context in _libraries(op, calls[0]):
        with context():
            baselines.append(_together(plain, calls, **how_given))
    for name, gradient in ours.items():
        direct = gradient.dtype not in HALF or name not in through
        parameter = direct and name.endswith(("weight", "bias"))
        kind = "param_grad" if parameter else "gemm" if op in GEMM_OPS else "op"
        torchs = [baseline[name] for baseline in baselines]
        check = judge(f"{op}, d{name}", gradient, oracle[name], torchs, kind=kind, **how)
        assert check.ok, check


def gradients(
    function: Callable, call: Call, grad: Callable, without: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The gradient of every floating tensor of the call but those named, by name."""
    given = {key: tensor for key, tensor in tensors(call).items() if key not in without}
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in given.items()}
    out = function(**(call | leaves))
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad(out)), strict=True))


def gives_what_is_needed(
    op: str, call: Call, names: Sequence[str], everything: dict[str, torch.Tensor], **tolerance: float
) -> None:
    """With any of the named tensors requiring gradients, these get theirs, and the others none."""
    for needed in product([True, False], repeat=len(names)):
        mask = dict(zip(names, needed, strict=True))
        leaves = {name: call[name].detach().clone().requires_grad_(wanted) for name, wanted in mask.items()}
        out = getattr(ops, op)(**call | leaves)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.backward(GRADS["contiguous"](out))
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == mask[name], name
            if mask[name]:
                torch.testing.assert_close(leaf.grad, everything[name], **tolerance)


def _together(
    function: Callable, calls: Sequence[Call], *, grad: Callable, dtype: torch.dtype, without: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Gradients of each call, stacked; those of the outputs are the same numbers for the oracle."""

    def numbered(place: int) -> Callable:
        def given(out: torch.Tensor) -> torch.Tensor:
            numbers = grad(out.to(dtype))
            # Other numbers for each call; ones, of stride 0, stay.
            return (numbers * (1 + place / 16) if place and any(numbers.stride()) else numbers).to(out.dtype)

        return given

    each = [gradients(function, call, numbered(place), without) for place, call in enumerate(calls)]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def _numbers(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Gradients as they arrive: from the next layer, from .sum() (every stride 0), from a transposition.
GRADS = {
    "contiguous": lambda out: _numbers(out.shape).to(out),
    "sum": lambda out: torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape),
    "transposed": lambda out: _numbers(out.mT.shape).to(out).mT,
}


def _libraries(op: str, call: Call) -> list[Callable]:
    contexts = [context for _, context in gemm_libraries(next(iter(tensors(call).values())).device)]
    return contexts if op in GEMM_OPS else contexts[:1]


def _plain_under(context: Callable, op: str, call: Call) -> torch.Tensor:
    with context():
        return getattr(plain_ops, op)(**call)


def _attention_scale(call: Call) -> torch.Tensor | None:
    """P max(1, |q||k| scale) |v|, how large attention's answer would be if nothing cancelled."""
    if not call.keys() <= {"qkv", "num_heads", "attn_mask"}:
        return None
    q, k, v = call["qkv"].double().unflatten(-1, (3, call["num_heads"], -1)).permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5
    mask = call.get("attn_mask", torch.ones((), dtype=torch.bool))
    logits = q @ k.mT * scale
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    weights = logits.softmax(-1).nan_to_num() * (q.abs() @ k.abs().mT * scale).clamp(min=1)
    return (weights @ v.abs()).transpose(1, 2).flatten(2)


def refuses(op: str, call: Call, error: type[Exception], words: str) -> None:
    """The op raises this error, in one line that names the op and says what is wrong."""
    with pytest.raises(error) as raised:
        getattr(ops, op)(**call)
    message = str(raised.value)
    assert raised.type is error
    assert message.startswith(f"{op}: ")
    assert "\n" not in message
    assert words in message, message
