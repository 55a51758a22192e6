"""A block's four ops, called past all that was decided before for a call of the same kind.

Each op asks which backend is for the call, and hands its arguments through several functions: on the CPU that
takes longer than small kernels take on a GPU. Nothing but metadata and torch's own settings decides. So once
all ops of a block ran on kernels, the next call in the same state, on tensors with the same metadata, goes to
those kernels at once. Where all of them record gradients, one node records those of the block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import asking, frames, gpus, measurements, recording
from ..call_facts import compute_dtype, needs_gradient
from ..ops import attention_triton, block_node, choices, native
from ..ops import direct as ops
from .attention import BetweenProjections
from .halves import AttentionHalf, MlpHalf, run_attention, run_mlp
from .regularization import drops, sample_scale
from .settings import Settings

MOST = 1024  # kinds of call that are kept; then they are looked at again
KERNELS = {
    "layer_norm_linear": ("cpp", "cuda"),
    "attention": ("triton",),
    "linear_residual": ("cpp", "cuda"),
    "layer_norm_mlp": ("cpp", "cuda"),
}
_UNKNOWN = object()
# What ``_how`` says of such calls, or None if not all ops ran on kernels.
_known: dict[tuple, ops.Decided | torch.dtype | None] = {}


def run(
    x: Tensor,
    attention: AttentionHalf,
    mlp: MlpHalf | Callable[[Tensor], Tensor],
    options: dict[str, Any],
    settings: Settings,
) -> Tensor:
    """Both halves on x [B, N, D], past the ops' decisions where those are known.

    ``options`` go to the attention half; a kind of call is known once it has run.
    """

    def ordinary() -> Tensor:
        return run_mlp(run_attention(x, attention, settings, **options), mlp, settings)

    key = _kind(x, attention, mlp, options, settings)
    if key is None:
        return ordinary()
    decided = _known.get(key, _UNKNOWN)
    if decided is _UNKNOWN:
        with recording.recording() as recorder:
            out = ordinary()
        seen = [(event.op, event.backend) for event in recorder.events]
        if len(_known) >= MOST:
            _known.clear()
        served = [op for op, _ in seen] == [*KERNELS] and all(name in KERNELS[op] for op, name in seen)
        _known[key] = _how(x, attention, mlp) if served else None
        return out
    if decided is None:
        return ordinary()
    if isinstance(decided, torch.dtype):
        return _recorded(x, attention, mlp, options, decided)
    return _direct(x, attention, mlp, options, decided)


def _how(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> ops.Decided | torch.dtype | None:
    """Of calls like this one: the dtype of their products if one node is to record all of it, or None if each
    op is to record its own; where nothing is recorded, what the ops decided, which is still to be seen.
    """
    norm = attention.norm
    weight, bias = ops.listed(attention.qkv_weight, attention.qkv_bias)
    if needs_gradient(x, norm.weight, norm.bias, *weight, *bias):
        weights = (*weight, attention.proj_weight, mlp.arguments["fc1_weight"])
        dtypes = {compute_dtype(weight) for weight in weights}
        return None if attention.branch.frozen or len(dtypes) > 1 else dtypes.pop()
    ending = attention.proj_weight, attention.proj_bias, attention.branch.layer_scale
    nothing = not needs_gradient(*ending, *mlp.arguments.values(), mlp.branch.layer_scale)
    qk_norm = attention.attend.qk_norm
    return {} if nothing and not needs_gradient(*(qk_norm or {}).values()) else None


def _recorded(
    x: Tensor, attention: AttentionHalf, mlp: MlpHalf, options: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    norm, between, branch = attention.norm, attention.attend, attention.branch
    weights, biases = ops.listed(attention.qkv_weight, attention.qkv_bias)
    weight, bias = native.joined(weights), native.joined(biases) if biases else None
    given = {**between.qk_norm, **options} if between.qk_norm else options
    values = attention_triton.values_of(len(weight) // (3 * between.num_heads), between.scale, given)
    ending = branch.layer_scale, sample_scale(branch.drop_path, x)
    inputs = ops.mlp_inputs(x, mlp.arguments, mlp.branch.layer_scale, sample_scale(mlp.branch.drop_path, x))
    how = mlp.arguments["eps"], mlp.arguments["activation"], mlp.arguments["norm"]
    return block_node.run(
        block_node.Plan(between.num_heads, norm.eps, norm.norm, *how, dtype),
        (x, norm.weight, norm.bias, weight, bias),
        values,
        (attention.proj_weight, attention.proj_bias, *ending),
        inputs[1:],
    )


def _direct(
    x: Tensor, attention: AttentionHalf, mlp: MlpHalf, options: dict[str, Any], decided: ops.Decided
) -> Tensor:
    norm, between, branch = attention.norm, attention.attend, attention.branch
    with torch._C._AutoDispatchBelowAutograd():
        packed = ops.layer_norm_linear(
            *(x, norm.weight, norm.bias, attention.qkv_weight, attention.qkv_bias),
            *(norm.eps, norm.norm, branch.frozen, decided),
        )
        tokens = ops.attention(packed, between.num_heads, between.scale, between.qk_norm, options)
        weights = attention.proj_weight, attention.proj_bias
        ending = branch.layer_scale, branch.frozen, decided
        x, moments = ops.linear_residual(tokens, *weights, x, *ending)
        branch = mlp.branch
        ending = branch.layer_scale, branch.frozen, moments, decided
        return ops.layer_norm_mlp(x, mlp.arguments, *ending)


def _kind(
    x: Tensor, attention: AttentionHalf, mlp: Any, options: dict[str, Any], settings: Settings
) -> tuple | None:
    """All by which the ops decide, or None for a call at which they are to look themselves."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or recording.active
        or asking.is_asking()
        or gpus.is_assumed()
        or measurements.are_listened_to()
        or choices.is_told()
    ):
        return None
    between, branch = attention.attend, attention.branch
    if (
        type(between) is not BetweenProjections
        or type(mlp) is not MlpHalf
        or between.norm is not None
        or between.dropout_p
        or settings.reference_ops
    ):
        return None
    gradients, drawn = torch.is_grad_enabled(), drops(branch.drop_path) or drops(mlp.branch.drop_path)
    if (drawn and (settings.subset or not gradients)) or (gradients and settings.checkpoint):
        return None
    norm, arguments = attention.norm, mlp.arguments
    state = gradients, drawn, frames.asked(), measurements.are_for_graphs(), measurements.generation
    key = [*state, between.num_heads, between.scale, norm.norm, branch.frozen, *arguments]
    tensors = (x, norm.weight, norm.bias, attention.qkv_weight, attention.qkv_bias)
    tensors += (attention.proj_weight, attention.proj_bias, branch.layer_scale, mlp.branch.layer_scale)
    key += options
    if not (_add(key, tensors) and _add(key, arguments.values()) and _add(key, options.values())):
        return None
    if between.qk_norm is not None and not _add(key, between.qk_norm.values()):
        return None
    if torch._C._is_any_autocast_enabled():
        kind = x.device.type
        key += (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    if x.is_cuda:
        key.append(torch._C._get_fp32_precision_getter("cuda", "matmul"))
    return tuple(key)


def _add(key: list, values: Any) -> bool:
    """Add what matters of values; False for a tensor of another type than torch's own."""
    for value in values:
        layer = type(value)
        if layer is nn.Parameter or layer is Tensor:
            key += (value.dtype, value.shape, value.device, value.requires_grad)
        elif layer is tuple:
            key.append(len(value))
            if not _add(key, value):
                return False
        elif layer in _PLAIN:
            key.append(value)
        else:
            return False
    return True


_PLAIN = frozenset((type(None), bool, int, float, str))


def forget() -> None:
    """Look at every kind of call again: for who changes in another way what backends can run."""
    _known.clear()
