"""linear_residual: the output projection with LayerScale, stochastic depth and the residual, in one op."""

from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backends
from ..asking import is_asking
from ..reference import linear_residual as reference
from . import checks
from .overrides import overridden


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    frozen: bool = False,
    with_moments: bool = False,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """residual + sample_scale * layer_scale * linear(x).

    Args:
        x: [B, N, K], floating, any strides.
        weight: [D, K], Linear's layout.
        bias: [D] or None.
        residual: [B, N, D].
        layer_scale: [D] or None.
        sample_scale: [B] or None, one factor a sample (stochastic depth).
        frozen: where no gradient is recorded, a copy of the weight may be kept, packed and with LayerScale
            multiplied in, which rounds otherwise than a factor; it follows what `fastvit.accelerate` says of
            its mode "inference".
        with_moments: return the moments of the result too, by which the next norm need not read it:
            `layer_norm_mlp` and `layer_norm_linear` take them.
        validate: False skips the checks below; fastvit's modules do, whose parameters fit each other.

    Returns:
        [B, N, D], contiguous; with ``with_moments`` beside it [D / 64 rounded up, B * N, 2] in float32
        (float64 of float64), or None where nothing is gained by them, or gradients are recorded.

    Raises:
        ValueError: for a wrong rank, shape or device.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: LayerScale arXiv 2103.17239, stochastic depth arXiv 1603.09382.
    """
    tensors = (x, weight, bias, residual, layer_scale, sample_scale)
    scales = {"layer_scale": layer_scale, "sample_scale": sample_scale}
    if overridden(tensors):
        options = {"frozen": frozen, "with_moments": with_moments}
        return handle_torch_function(linear_residual, tensors, *tensors[:4], **scales, **options)
    if validate:
        _check(*tensors)
    backend = backends.resolve("linear_residual", *tensors[:4], **scales, frozen=frozen)
    if backend in ("cpp", "cuda"):
        from .linear_residual_native import linear_residual as native

        out, moments = native(*tensors[:4], **scales, frozen=frozen, with_moments=with_moments)
        return (out, moments) if with_moments else out
    out = residual.new_empty(residual.shape) if is_asking() else reference(*tensors[:4], **scales)
    return (out, None) if with_moments else out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
) -> None:
    op = "linear_residual"
    checks.rank(op, "x", x, "B, N, K")
    checks.floating(op, "x", x)
    checks.rank(op, "weight", weight, "D, K")
    batch, tokens, in_features = x.shape
    dim = weight.shape[0]
    checks.fit(
        op,
        "x",
        x,
        ("weight", weight, (dim, in_features)),
        ("bias", bias, (dim,)),
        ("residual", residual, (batch, tokens, dim)),
        ("layer_scale", layer_scale, (dim,)),
        ("sample_scale", sample_scale, (batch,)),
    )
