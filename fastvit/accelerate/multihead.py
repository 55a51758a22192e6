"""nn.MultiheadAttention as self-attention: its packed projection is what our ops read."""

from torch import Tensor, nn

from ..layers.attention import BetweenProjections
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
    dropout_p = attn.dropout if attn.training else 0.0
    between = BetweenProjections(attn.num_heads, dropout_p=dropout_p)
    return AttentionHalf(norm.beside(weight), weight, bias, between, *out, branch)


def mask_of_heads(mask: Tensor, num_heads: int) -> Tensor:
    """A mask [N, N] or [B * H, N, N], as nn.MultiheadAttention takes it, as the op does: [B, H, N, N]."""
    return mask if mask.ndim != 3 else mask.unflatten(0, (mask.shape[0] // num_heads, num_heads))
