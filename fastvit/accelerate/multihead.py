"""nn.MultiheadAttention as self-attention: its packed projection is what our ops read."""

from functools import partial

from torch import Tensor, nn

from .. import ops
from ..layers.halves import AttentionHalf, Branch
from ..layers.norm import NormArguments
from ..layers.plain import LINEARS, Unfused, known, parameter, plain_child, weight_and_bias

MULTIHEAD = (known(nn.MultiheadAttention),)


def attention_half(block: nn.Module, name: str, norm: NormArguments, branch: Branch) -> AttentionHalf:
    """The half with the block's attention of that name, called with the same tokens thrice.

    Raises:
        Unfused: if it is to run its own forward.
    """
    attn = plain_child(block, name, MULTIHEAD)
    weight, bias = (parameter(attn, f"in_proj_{kind}") for kind in ("weight", "bias"))
    if weight is None:
        raise Unfused(f"{name} has keys or values of another width")
    if not attn.batch_first:
        raise Unfused(f"{name} takes the tokens before the batch")
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        raise Unfused(f"{name} adds a key and a value of its own")
    out = weight_and_bias(plain_child(attn, "out_proj", LINEARS))
    return AttentionHalf(norm.beside(weight), weight, bias, partial(attend, attn), *out, branch)


def attend(attn: nn.Module, qkv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """What lies between the projections; the mask is added to the logits, [N, N] or [B * H, N, N]."""
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (qkv.shape[0], attn.num_heads))
    dropout_p = attn.dropout if attn.training else 0.0
    return ops.attention(
        qkv, attn.num_heads, attn_mask=attn_mask, dropout_p=dropout_p, validate=attn_mask is not None
    )
