"""layer_norm_mlp: the MLP half of a block, in one op."""

from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backends
from ..asking import is_asking
from ..reference import layer_norm_mlp as reference
from ..reference.activations import ACTIVATIONS, GATED
from . import checks
from .overrides import overridden


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    norm: str = "layer_norm",
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    inner_norm_weight: Tensor | None = None,
    inner_norm_bias: Tensor | None = None,
    frozen: bool = False,
    moments: Tensor | None = None,
    with_moments: bool = False,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """x + sample_scale * layer_scale * fc2(inner_norm(act(fc1(norm(x))))).

    Args:
        x: [B, N, D], floating, any strides; it is the residual too.
        norm_weight, norm_bias: [D] or None; norm_bias is None for "rms_norm".
        fc1_weight: [M, D], Linear's layout; [2M, D] with the gate's half first for packed "swiglu".
        fc1_bias: [M] (or [2M]) or None.
        fc2_weight: [D, M].
        fc2_bias: [D] or None.
        eps: of the norm and of the inner norm.
        activation: "gelu" (exact, erf), "gelu_tanh", "quick_gelu", "silu", "relu" or "swiglu".
        norm: "layer_norm" or "rms_norm", for both norms.
        layer_scale: [D] or None.
        sample_scale: [B] or None, one factor a sample (stochastic depth).
        gate_weight, gate_bias: [M, D] and [M], a gate of its own for "swiglu", or None.
        inner_norm_weight, inner_norm_bias: [M] or None, a norm between activation and fc2.
        frozen: where no gradient is recorded, copies of the weights may be kept, packed, and LayerScale and
            the norm folded in, which rounds otherwise; they follow what `fastvit.accelerate` says of its mode
            "inference".
        moments: what `linear_residual` or this op returned beside x, or None: where no gradient is recorded
            the norm's statistics are taken from them. They must be of x as it is now.
        with_moments: return those of the result too, as `linear_residual` does.
        validate: False skips the checks below; fastvit's modules do, whose parameters fit each other.

    Returns:
        [B, N, D], contiguous; with ``with_moments`` beside it its moments or None.

    Raises:
        ValueError: for a wrong rank, shape or device, an unknown activation or norm, a gate without "swiglu",
            a bias without its weight.
        TypeError: for a wrong or mixed dtype.
        BackendUnavailable: if a backend was named and cannot run.

    Source: GELU arXiv 1606.08415, SwiGLU arXiv 2002.05202, LayerScale arXiv 2103.17239.
    """
    required = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    optional = {
        "layer_scale": layer_scale,
        "sample_scale": sample_scale,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "inner_norm_weight": inner_norm_weight,
        "inner_norm_bias": inner_norm_bias,
    }
    options = {"eps": eps, "activation": activation, "norm": norm, **optional}
    tensors = (*required, *optional.values())
    if overridden(tensors):
        options |= {"frozen": frozen, "moments": moments, "with_moments": with_moments}
        return handle_torch_function(layer_norm_mlp, tensors, *required, **options)
    if validate:
        _check(*required, activation, norm, **optional)
    backend = backends.resolve("layer_norm_mlp", *required, **options, frozen=frozen)
    if backend in ("cpp", "cuda"):
        from .layer_norm_mlp_native import layer_norm_mlp as native

        given = {"frozen": frozen, "moments": moments, "with_moments": with_moments}
        out, own = native(*required, **options, **given)
        return (out, own) if with_moments else out
    out = x.new_empty(x.shape) if is_asking() else reference(*required, **options)
    return (out, None) if with_moments else out


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    norm: str,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    inner_norm_weight: Tensor | None,
    inner_norm_bias: Tensor | None,
) -> None:
    op = "layer_norm_mlp"
    _check_kinds(activation, norm, norm_bias, gate_weight, gate_bias, inner_norm_weight, inner_norm_bias)
    checks.rank(op, "x", x, "B, N, D")
    checks.floating(op, "x", x)
    checks.rank(op, "fc2_weight", fc2_weight, "D, M")
    dim, hidden = x.shape[-1], fc2_weight.shape[-1]
    fc1_rows = 2 * hidden if activation in GATED and gate_weight is None else hidden
    checks.fit(
        op,
        "x",
        x,
        ("norm_weight", norm_weight, (dim,)),
        ("norm_bias", norm_bias, (dim,)),
        ("fc1_weight", fc1_weight, (fc1_rows, dim)),
        ("fc1_bias", fc1_bias, (fc1_rows,)),
        ("fc2_weight", fc2_weight, (dim, hidden)),
        ("fc2_bias", fc2_bias, (dim,)),
        ("layer_scale", layer_scale, (dim,)),
        ("sample_scale", sample_scale, (x.shape[0],)),
        ("gate_weight", gate_weight, (hidden, dim)),
        ("gate_bias", gate_bias, (hidden,)),
        ("inner_norm_weight", inner_norm_weight, (hidden,)),
        ("inner_norm_bias", inner_norm_bias, (hidden,)),
    )


def _check_kinds(
    activation: str,
    norm: str,
    norm_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    inner_norm_weight: Tensor | None,
    inner_norm_bias: Tensor | None,
) -> None:
    op = "layer_norm_mlp"
    if activation not in ACTIVATIONS and activation not in GATED:
        known = ", ".join([*ACTIVATIONS, *GATED])
        raise ValueError(f"{op}: activation is {activation!r}; it must be one of {known}")
    if gate_weight is not None and activation not in GATED:
        gated = ", ".join(GATED)
        raise ValueError(f"{op}: activation {activation!r} has no gate; pass gate_weight only with {gated}")
    checks.goes_with(op, "gate_bias", gate_bias, "gate_weight", gate_weight)
    checks.goes_with(op, "inner_norm_bias", inner_norm_bias, "inner_norm_weight", inner_norm_weight)
    checks.norm(op, "norm", norm, ("norm_bias", norm_bias), ("inner_norm_bias", inner_norm_bias))
