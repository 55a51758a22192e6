"""attention on the Triton kernels: the registered ops, their shapes for compilers, and their gradients.

    fastvit::attention_fwd(q, k, v, ..., with_lse) -> out [B, N, H * d], lse [B, H, N] (or [0]) in float32
    fastvit::attention_bwd(grad_out, q, k, v, out, lse, ..., norm_grads) -> dqkv [B, N, 3, H, d], dnorms ...

q, k and v are views [B, N, H, d] with any strides; ``qk_norm`` is "" for none. float32 products are in tf32
if torch's own op would use it, which is looked up at each call. The kernels load at the first one.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient, tf32
from . import registration

OPTIONS = (
    "float scale, Tensor? attn_mask, Tensor? key_mask, str qk_norm, Tensor? q_norm_weight, "
    "Tensor? q_norm_bias, Tensor? k_norm_weight, Tensor? k_norm_bias, float qk_norm_eps, Tensor? rope_cos, "
    "Tensor? rope_sin, str rope_layout, int num_prefix_tokens"
)
NAMES = tuple(option.split()[-1] for option in OPTIONS.split(", "))
_DEFAULTS = dict.fromkeys(NAMES) | {
    "qk_norm": "",
    "qk_norm_eps": 1e-6,
    "rope_layout": "half",
    "num_prefix_tokens": 0,
}
NORMS = NAMES[4:8]  # what may get a gradient beside q, k and v


def attention(
    qkv: Tensor, views: tuple[Tensor, ...], *, scale: float | None, qk_norm: str | None, **options
) -> Tensor:
    """The public op's call on the kernels, which get q, k and v, views of qkv, and give it one gradient.

    Under autocast it runs in low precision, as torch's attention does; the norms of q and k keep float32
    weights and statistics.
    """
    _, _, num_heads, head_dim = views[0].shape
    options["scale"] = head_dim**-0.5 if scale is None else scale
    options["qk_norm"] = qk_norm or ""
    values = [options[name] for name in NAMES]
    dtype = compute_dtype(qkv)
    if qkv.dtype != dtype:
        qkv = qkv.to(dtype)
        views = _split(qkv, num_heads)
    if registration.records_gradients(qkv, *values):
        return Packed.apply(qkv, num_heads, *values)
    return registration.call(_fwd, *views, *values, False)[0]


def packed(qkv: Tensor, num_heads: int, scale: float | None, options: dict) -> Tensor:
    """The kernel's forward of qkv in its own dtype, in the op's place: no gradients, nobody looks on."""
    kernels, options_of = _kernels()
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale
    precise = qkv.dtype != torch.float32 or not tf32("attention")
    given = options_of(scale, precision="ieee" if precise else "tf32", **options)
    return kernels.attention_packed(qkv, num_heads, given)


@cache
def _kernels() -> tuple[Any, type]:
    """An import statement takes a microsecond each time."""
    from fastvit_kernels import attention
    from fastvit_kernels.attention_options import Options

    return attention, Options


def attention_of_views(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, attn_mask: Tensor | None
) -> Tensor:
    """Of q, k and v that are projections of their own: no copy of them is made."""
    dtype = compute_dtype(q)
    values = values_of(q.shape[-1], scale, {"attn_mask": attn_mask})
    return _fwd(q.to(dtype), k.to(dtype), v.to(dtype), *values, False)[0]


def values_of(head_dim: int, scale: float | None, options: dict) -> list:
    """Of `NAMES`, by the public op's options."""
    scale = head_dim**-0.5 if scale is None else scale
    given = {**_DEFAULTS, **options, "scale": scale}
    return [given[name] for name in NAMES]


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).unbind(2)


class Packed(Function):
    """Of packed qkv [B, N, 3 * H * d]: what is saved is qkv and not its views, what comes back one tensor."""

    @staticmethod
    def forward(ctx, qkv, num_heads, *values):
        out, lse = registration.call(_fwd, *_split(qkv, num_heads), *values, True)
        ctx.num_heads = num_heads
        _save(ctx, (qkv, out, lse), values)
        return out

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad_out):
        (qkv, out, lse), values = _saved(ctx, 3)
        views = _split(qkv, ctx.num_heads)
        dqkv, norms = _gradients(grad_out, *views, out, lse, values, ctx.needs_input_grad[2:])
        return dqkv.flatten(2) if ctx.needs_input_grad[0] else None, None, *norms


class _Separate(Function):
    """Of q, k and v that are projections of their own."""

    @staticmethod
    def forward(ctx, q, k, v, *values):
        out, lse = registration.call(_fwd, q, k, v, *values, True)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        _save(ctx, (q, k, v, out, lse), values)
        return out, lse

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, values = _saved(ctx, 5)
        needs = ctx.needs_input_grad
        dqkv, norms = _gradients(grad_out, *tensors, values, needs[3:])
        return *(d if needed else None for d, needed in zip(dqkv.unbind(2), needs, strict=False)), *norms


def _save(ctx, tensors: tuple[Tensor, ...], values: tuple) -> None:
    ctx.save_for_backward(*tensors, *[value if isinstance(value, Tensor) else None for value in values])
    ctx.values = tuple([None if isinstance(value, Tensor) else value for value in values])


def _saved(ctx, count: int) -> tuple[tuple[Tensor, ...], tuple]:
    tensors = ctx.saved_tensors
    options = zip(tensors[count:], ctx.values, strict=True)
    return tensors[:count], tuple([value if tensor is None else tensor for tensor, value in options])


def _gradients(grad_out, q, k, v, out, lse, values: tuple, needs: tuple[bool, ...]):
    """dqkv, and a gradient or None for each of the values."""
    wanted = tuple([name for name, needed in zip(NAMES, needs, strict=True) if needed])
    norms = [name in NORMS for name in wanted]
    if not all(norms):
        raise NotImplementedError(f"fastvit::attention_fwd gives no gradient to {', '.join(wanted)}")
    dqkv, *given = registration.call(_bwd, grad_out, q, k, v, out, lse, *values, bool(wanted))
    given = dict(zip(_norm_weights(values), given, strict=False))
    return dqkv, [given[name] if needed else None for name, needed in zip(NAMES, needs, strict=True)]


def _norm_weights(values: tuple) -> list[str]:
    """The names of the norms' weights and biases that the call has."""
    return [name for name, value in zip(NAMES, values, strict=True) if name in NORMS and value is not None]


def _arguments(q: Tensor, values: tuple) -> dict:
    options = dict(zip(NAMES, values, strict=True))
    precise = q.dtype != torch.float32 or not tf32("attention")
    return options | {"qk_norm": options["qk_norm"] or None, "precision": "ieee" if precise else "tf32"}


def _channels_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _fwd_kernels(q, k, v, *values):
    from fastvit_kernels import attention as kernels

    *values, with_lse = values
    return kernels.attention_fwd(*_channels_contiguous(q, k, v), with_lse=with_lse, **_arguments(q, values))


def _fwd_shapes(q, k, v, *values):
    batch, tokens, heads, head_dim = q.shape
    lse = q.new_empty((batch, heads, tokens) if values[-1] else (0,), dtype=torch.float32)
    return q.new_empty(batch, tokens, heads * head_dim), lse


def _fwd_autograd(q, k, v, *values):
    if not needs_gradient(q, k, v, *values):
        return registration.below_autograd(_fwd, q, k, v, *values)
    out, lse = _Separate.apply(q, k, v, *values[:-1])
    return out, lse if values[-1] else lse.new_empty(0)


def _bwd_kernels(grad_out, q, k, v, out, lse, *values):
    from fastvit_kernels import attention as kernels

    *values, norm_grads = values
    options = _arguments(q, values)
    # Read across, a transposed gradient takes more registers than some GPUs have.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    dqkv, *norms = kernels.attention_bwd(
        grad_out, *_channels_contiguous(q, k, v), out, lse, norm_grads=norm_grads, **options
    )
    if not norm_grads:
        return [dqkv]
    norms = dict(zip(NORMS, norms, strict=True))
    # Copies, since what an op returns shares no memory: the kernels add up all four in one tensor.
    return [dqkv, *[norms[name].to(options[name].dtype, copy=True) for name in _norm_weights(tuple(values))]]


def _bwd_shapes(grad_out, q, k, v, out, lse, *values):
    *values, norm_grads = values
    batch, tokens, heads, head_dim = q.shape
    weights = dict(zip(NAMES, values, strict=True))
    norms = _norm_weights(tuple(values)) if norm_grads else []
    dqkv = q.new_empty(batch, tokens, 3, heads, head_dim)
    return [dqkv, *[weights[name].new_empty(head_dim) for name in norms]]


_fwd = registration.register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}, bool with_lse) -> (Tensor, Tensor)",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
    compiled=False,
)
_bwd = registration.register(
    f"attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {OPTIONS}, "
    "bool norm_grads) -> Tensor[]",
    _bwd_kernels,
    _bwd_shapes,
    compiled=False,
)
