"""attention: exact softmax attention on the packed QKV projection, in one op."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backends
from ..asking import is_asking
from ..call_facts import compute_dtype
from ..reference import attention as reference
from ..reference.rotary import ROPE_LAYOUTS
from . import attention_triton, checks
from .overrides import overridden


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_layout: str = "half",
    num_prefix_tokens: int = 0,
    validate: bool = True,
) -> Tensor:
    """softmax(scale q k^T + mask) v for every head; norm, then rotation, of q and k come first.

    Args:
        qkv: [B, N, 3 * H * d], floating, in the order (3, H, d) that a fused projection gives.
        num_heads: H.
        scale: defaults to d ** -0.5.
        attn_mask: bool (True takes part) or additive floating (qkv's dtype or float32);
            [N, N], or up to [B, H, N, N].
        key_mask: bool [B, N], True takes part.
        is_causal: token i sees tokens 0..i; not together with attn_mask.
        dropout_p: probability of dropping an attention weight; the caller passes 0 in evaluation.
        qk_norm: "layer_norm", "rms_norm" or None: q and k are normalised over d.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [d] or None.
        qk_norm_eps: of both.
        rope_cos, rope_sin: [N - P, d], or up to [B, H, N - P, d], both or neither: rotary positions.
        rope_layout: "half" (channel i with i + d/2) or "interleaved" (2i with 2i + 1).
        num_prefix_tokens: P, leading tokens that are not rotated.
        validate: False skips the checks below; fastvit's modules do, whose parameters fit each other.

    Returns:
        [B, N, H * d], contiguous, the layout that the output projection reads. A row whose every key is
        masked gives zeros, as torch's fused op does.

    Raises:
        ValueError: for a wrong rank, shape or device, heads that do not divide the width, options that
            exclude each other.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: arXiv 1706.03762; q/k norm arXiv 2302.05442; rotary positions arXiv 2104.09864.
    """
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    tensors = (qkv, attn_mask, key_mask, *norms, rope_cos, rope_sin)
    options = {
        "scale": scale,
        "attn_mask": attn_mask,
        "key_mask": key_mask,
        "is_causal": is_causal,
        "dropout_p": dropout_p,
        "qk_norm": qk_norm,
        "q_norm_weight": q_norm_weight,
        "q_norm_bias": q_norm_bias,
        "k_norm_weight": k_norm_weight,
        "k_norm_bias": k_norm_bias,
        "qk_norm_eps": qk_norm_eps,
        "rope_cos": rope_cos,
        "rope_sin": rope_sin,
        "rope_layout": rope_layout,
        "num_prefix_tokens": num_prefix_tokens,
    }
    if overridden(tensors):
        return handle_torch_function(attention, tensors, qkv, num_heads, **options)
    if validate:
        head_dim = _check_packing(qkv, num_heads)
        _check_masks(qkv, num_heads, attn_mask, key_mask, is_causal)
        _check_norms(qkv, head_dim, qk_norm, *norms)
        _check_rotary(qkv, head_dim, rope_cos, rope_sin, rope_layout, num_prefix_tokens)
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    q, k, v = qkv.view(batch, tokens, 3, num_heads, head_dim).unbind(2)
    backend = backends.resolve("attention", q, k, v, **options)
    if backend == "triton":
        return attention_triton.attention(qkv, (q, k, v), **options)
    if is_asking():
        return qkv.new_empty((batch, tokens, width // 3), dtype=compute_dtype(qkv))
    return reference(q, k, v, **options, attend=_attend(backend))


def attention_of_views(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """The same of q, k and v [B, N, H, d] with any strides, without norms and rotary positions, or checks."""
    options = {"scale": scale, "attn_mask": attn_mask, "is_causal": is_causal, "dropout_p": dropout_p}
    backend = backends.resolve("attention", q, k, v, **options)
    if backend == "triton":
        return attention_triton.attention_of_views(q, k, v, scale, attn_mask)
    return reference(q, k, v, **options, attend=_attend(backend))


def _attend(backend: str) -> Callable[..., Tensor] | None:
    """What stands in the place of torch's own product of queries, keys and values, if anything does."""
    if backend != "cpp":
        return None
    from .attention_native import attend  # its ops are registered by the first call

    return attend


def _check_packing(qkv: Tensor, num_heads: int) -> int:
    checks.rank("attention", "qkv", qkv, "B, N, 3*H*d")
    checks.floating("attention", "qkv", qkv)
    width = qkv.shape[-1]
    if num_heads < 1 or width % (3 * num_heads) or not width:
        raise ValueError(
            f"attention: {num_heads} heads do not divide qkv's width {width}; it must be 3 * heads * head_dim"
        )
    return width // (3 * num_heads)


def _check_masks(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool
) -> None:
    batch, tokens, _ = qkv.shape
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                "attention: is_causal and attn_mask exclude each other; put the triangle in attn_mask"
            )
        full = (batch, num_heads, tokens, tokens)
        if attn_mask.ndim < 2 or not _broadcasts(attn_mask, full):
            raise ValueError(
                f"attention: attn_mask must be [N, N] = {list(full[2:])}, or up to [B, H, N, N] = "
                f"{list(full)}; its shape is {list(attn_mask.shape)}"
            )
        if attn_mask.dtype.is_floating_point:
            if attn_mask.dtype != torch.float32:
                checks.fit("attention", "qkv", qkv, ("attn_mask", attn_mask, attn_mask.shape))
        elif attn_mask.dtype != torch.bool:
            raise TypeError(f"attention: attn_mask must be bool or floating point; it is {attn_mask.dtype}")
    if key_mask is not None:
        if key_mask.shape != (batch, tokens):
            raise ValueError(
                f"attention: key_mask must have shape {[batch, tokens]}; it has {list(key_mask.shape)}"
            )
        if key_mask.dtype != torch.bool:
            raise TypeError(f"attention: key_mask must be bool; it is {key_mask.dtype}")
    checks.device("attention", "qkv", qkv, "attn_mask", attn_mask)
    checks.device("attention", "qkv", qkv, "key_mask", key_mask)


def _broadcasts(tensor: Tensor, full: tuple[int, ...]) -> bool:
    given = (1,) * (len(full) - tensor.ndim) + tuple(tensor.shape)
    return len(given) == len(full) and all(have in (1, want) for have, want in zip(given, full, strict=True))


def _check_norms(
    qkv: Tensor,
    head_dim: int,
    qk_norm: str | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
) -> None:
    expected = (
        ("q_norm_weight", q_weight, (head_dim,)),
        ("q_norm_bias", q_bias, (head_dim,)),
        ("k_norm_weight", k_weight, (head_dim,)),
        ("k_norm_bias", k_bias, (head_dim,)),
    )
    if qk_norm is None:
        given = [name for name, tensor, _ in expected if tensor is not None]
        if given:
            raise ValueError(f"attention: {given[0]} is given, but qk_norm is None; name the norm")
        return
    checks.norm("attention", "qk_norm", qk_norm, ("q_norm_bias", q_bias), ("k_norm_bias", k_bias))
    checks.fit("attention", "qkv", qkv, *expected)


def _check_rotary(
    qkv: Tensor, head_dim: int, cos: Tensor | None, sin: Tensor | None, layout: str, num_prefix: int
) -> None:
    if layout not in ROPE_LAYOUTS:
        known = ", ".join(ROPE_LAYOUTS)
        raise ValueError(f"attention: rope_layout is {layout!r}; it must be one of {known}")
    batch, tokens, width = qkv.shape
    if not 0 <= num_prefix <= tokens:
        raise ValueError(f"attention: num_prefix_tokens is {num_prefix}; it must be 0 to N = {tokens}")
    if (cos is None) != (sin is None):
        raise ValueError("attention: rope_cos and rope_sin go together; one of them is None")
    if cos is None:
        return
    if head_dim % 2:
        raise ValueError(f"attention: rotary positions need an even head_dim; it is {head_dim}")
    full = (batch, width // (3 * head_dim), tokens - num_prefix, head_dim)
    for name, table in (("rope_cos", cos), ("rope_sin", sin)):
        if tuple(table.shape[-2:]) != full[-2:] or not _broadcasts(table, full):
            raise ValueError(
                f"attention: {name} must be [N - P, d] = {list(full[2:])}, or up to [B, H, N - P, d] = "
                f"{list(full)}; its shape is {list(table.shape)}"
            )
        checks.floating("attention", name, table)
        checks.device("attention", "qkv", qkv, name, table)
