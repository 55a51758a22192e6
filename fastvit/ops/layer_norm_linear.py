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
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "layer_norm",
    frozen: bool = False,
    moments: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """linear(norm(x)).

    Args:
        x: [B, N, D], floating, any strides.
        norm_weight, norm_bias: [D] or None; norm_bias is None for "rms_norm".
        weight: [O, D], Linear's layout; or several, say of q, k and v, whose outputs are put side by side.
        bias: [O] or None; one for each of several weights.
        eps: of the norm.
        norm: "layer_norm" or "rms_norm".
        frozen: where no gradient is recorded, copies of norm and weights may be kept, packed and folded; they
            follow what `fastvit.accelerate` says of its mode "inference".
        moments: what `linear_residual` or `layer_norm_mlp` returned beside x, or None: where no gradient is
            recorded the norm's statistics are taken from them. They must be of x as it is now.
        validate: False skips the checks below; fastvit's modules do, whose parameters fit each other.

    Returns:
        [B, N, O], contiguous; O of all weights together.

    Raises:
        ValueError: for a wrong rank, shape, device or norm.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467.
    """
    inputs = (x, norm_weight, norm_bias, weight, bias)
    tensors = (x, norm_weight, norm_bias, *several(weight), *several(bias))
    if overridden(tensors):
        options = {"eps": eps, "norm": norm, "frozen": frozen, "moments": moments}
        return handle_torch_function(layer_norm_linear, tensors, *inputs, **options)
    if validate:
        _check(*inputs, norm)
    backend = backends.resolve("layer_norm_linear", *inputs, eps=eps, norm=norm, frozen=frozen)
    if backend in ("cpp", "cuda"):
        from .layer_norm_linear_native import layer_norm_linear as native

        parameters = norm_weight, norm_bias, several(weight), several(bias)
        return native(x, *parameters, eps=eps, norm=norm, frozen=frozen, moments=moments)
    if is_asking():
        width = sum(map(len, several(weight)))
        return x.new_empty((*x.shape[:-1], width), dtype=compute_dtype(several(weight)[0]))
    return reference(*inputs, eps=eps, norm=norm)


def several(tensors: Tensor | tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
    """One as of several."""
    return tensors if isinstance(tensors, (tuple, list)) else (tensors,)


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None,
    norm: str,
) -> None:
    op = "layer_norm_linear"
    checks.rank(op, "x", x, "B, N, D")
    checks.floating(op, "x", x)
    checks.norm(op, "norm", norm, ("norm_bias", norm_bias))
    dim = x.shape[-1]
    checks.fit(op, "x", x, ("norm_weight", norm_weight, (dim,)), ("norm_bias", norm_bias, (dim,)))
    weights, biases = several(weight), several(bias)
    if len(weights) != len(biases):
        raise ValueError(
            f"{op}: {len(weights)} weights need as many biases, or None each; there are {len(biases)}"
        )
    for i, (one, beside) in enumerate(zip(weights, biases, strict=True)):
        names = ("weight", "bias") if len(weights) == 1 else (f"weight[{i}]", f"bias[{i}]")
        checks.rank(op, names[0], one, "O, D")
        checks.fit(op, "x", x, (names[0], one, (len(one), dim)), (names[1], beside, (len(one),)))
