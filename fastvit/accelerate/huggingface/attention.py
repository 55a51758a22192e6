"""`attn_implementation="fastvit"`: fastvit's attention, and its masks, for transformers' models at large."""

from torch import Tensor, nn

from ...ops.attention import attention_of_views


def register_hf() -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers, once or again.

    Attention and the masks for it are registered together: transformers gives a function whose masks it does
    not know none at all. Calls that the op does not compute go to transformers' "sdpa"; a model that cannot
    run on that raises ValueError when it is called.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("fastvit", attention_forward)
    AttentionMaskInterface.register("fastvit", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, N, d] each to [B, N, H, d], and no weights.

    Raises:
        ValueError: for a model that cannot run on transformers' "sdpa".
    """
    from .sdpa import READ_BY_SDPA, sdpa_attention_forward, takes_sdpa

    if not takes_sdpa(type(module)):
        raise ValueError(
            f"{type(module).__name__} computes more than attention: as with 'sdpa', 'fastvit' is not for it"
        )
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    if given & READ_BY_SDPA or not query.shape == key.shape == value.shape:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    views = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    is_causal = bool(is_causal) and attention_mask is None
    out = attention_of_views(*views, scaling, attention_mask, is_causal, dropout)
    return out.unflatten(-1, views[0].shape[2:]), None
