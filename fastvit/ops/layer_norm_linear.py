"""layer_norm_linear: norm1 and the QKV projection, in one op."""

from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backends
from ..asking import is_asking
from ..call_facts import compute_dtype
from ..reference import layer_norm_linear as reference
from . import checks
from .overrides import overridden


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "layer_norm",
    fold: bool = False,
    validate: bool = True,
) -> Tensor:
    """linear(norm(x)).

    Args:
        x: [B, N, D], floating, any strides.
        norm_weight, norm_bias: [D] or None; norm_bias is None for "rms_norm".
        weight: [O, D], Linear's layout.
        bias: [O] or None.
        eps: of the norm.
        norm: "layer_norm" or "rms_norm".
        fold: where no gradient is recorded, the norm may be folded into a copy of the weight that is kept
            until one of them changes.
        validate: False skips the checks below; fastvit's modules do, whose parameters fit each other.

    Returns:
        [B, N, O], contiguous.

    Raises:
        ValueError: for a wrong rank, shape, device or norm.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467.
    """
    tensors = (x, norm_weight, norm_bias, weight, bias)
    if overridden(tensors):
        return handle_torch_function(layer_norm_linear, tensors, *tensors, eps=eps, norm=norm, fold=fold)
    if validate:
        _check(*tensors, norm)
    backend = backends.resolve("layer_norm_linear", *tensors, eps=eps, norm=norm)
    if backend in ("cpp", "cuda"):
        from .layer_norm_linear_native import layer_norm_linear as native

        return native(*tensors, eps=eps, norm=norm, fold=fold)
    if is_asking():
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype(x))
    return reference(*tensors, eps=eps, norm=norm)


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
) -> None:
    op = "layer_norm_linear"
    checks.rank(op, "x", x, "B, N, D")
    checks.floating(op, "x", x)
    checks.rank(op, "weight", weight, "O, D")
    checks.norm(op, "norm", norm, ("norm_bias", norm_bias))
    dim, out_features = x.shape[-1], weight.shape[0]
    checks.fit(
        op,
        "x",
        x,
        ("weight", weight, (out_features, dim)),
        ("norm_weight", norm_weight, (dim,)),
        ("norm_bias", norm_bias, (dim,)),
        ("bias", bias, (out_features,)),
    )
