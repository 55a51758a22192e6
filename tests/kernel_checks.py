"""How the Triton kernels are held to the contract; each check raises ``AssertionError``."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import plain_ops
import torch
from kernel_launches import DEVICE, GRADS, NORM_WEIGHTS, attention_launch, embed_launch, on_device
from op_cases import Call, float64, tensors
from torch import Tensor

from fastvit.contract import HALF, judge, judge_saved


def attention_within_contract(
    kernels: ModuleType, call: Call, grad: str | None = None, *, precision: str = "ieee", **memory
) -> None:
    """Output and log-sum-exp, or with ``grad`` each gradient instead, by the parity contract."""
    call = on_device(call)
    found = attention_launch(kernels, call, grad, precision=precision, **memory)
    out, lse = found.pop("out"), found.pop("lse")
    floor_only = call["qkv"].shape[1] <= 2
    # The floor that cancellation grants would hide much of an output in half precision.
    strict = grad is None and out.dtype in HALF and not floor_only
    how = {"tf32": precision == "tf32", "floor_only": floor_only, "backward": grad is not None}
    given = None if grad is None else GRADS[grad](out)
    sizes = {} if strict else attention_sizes(call, given)
    if grad is None:
        truth, torchs = plain("attention", float64(call)), plain("attention", call, precision)
        check = judge("out", out, truth, torchs, kind="op", scale=sizes.get("out"), **how)
        assert check.ok, check
        # In half precision normalised or rotated q and k are rounded before they meet.
        if precision == "ieee" and (out.dtype not in HALF or _is_bare(call)):
            _, _, logits, large = _logits(call)
            # An lse near zero is measured by what cancelled: the logits' products, and log N.
            size = (logits.softmax(-1).nan_to_num() * large).sum(-1) + lse.shape[-1] ** 0.5
            truth = logits.logsumexp(-1)
            # A row that a float mask makes very low is kept in another way: see lse_of.
            usual = ~(truth.isfinite() & (truth < -1e30))
            scale = size.clamp(max=1e3)[usual]
            check = judge_saved("lse", lse[usual], truth[usual], scale=scale)
            assert check.ok, check
        return
    names = [name for name in ("qkv", *NORM_WEIGHTS) if call.get(name) is not None]
    truth = _parts(plain_gradients("attention", float64(call), given.double(), names), call["num_heads"])
    torchs = _parts(plain_gradients("attention", call, given, names, precision), call["num_heads"])
    assert found.keys() == truth.keys()
    for name, gradient in found.items():
        # The norms' weights get theirs through the softmax, where torch's own error is a yardstick again.
        wide = name in NORM_WEIGHTS and out.dtype not in HALF
        kind = "param_grad" if wide else "dq" if name == "q" else "op"
        check = judge(
            f"d{name}", gradient, truth[name], torchs[name], kind=kind, scale=sizes.get(name), **how
        )
        assert check.ok, check


def attention_sizes(call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """How large output and gradients would be if nothing cancelled, in float64.

    The products taken with absolute values: P max(1, |q||k| scale) |v|, and the gradients alike. Those of
    normalised or rotated q and k stand for those of the raw ones, which are about as large.
    """
    v = call["qkv"].double().unflatten(-1, (3, call["num_heads"], -1))[:, :, 2].transpose(1, 2).abs()
    q, k, logits, large = _logits(call)
    weights = logits.softmax(-1).nan_to_num()
    heavy = weights * large.clamp(min=1)
    sizes = {"out": (heavy @ v).transpose(1, 2).flatten(2)}
    if grad is not None:
        do = grad.double().unflatten(-1, (call["num_heads"], -1)).transpose(1, 2).abs()
        dp = do @ v.mT
        ds = heavy * (dp + (dp * weights).sum(-1, keepdim=True)) * _scale(call)
        parts = {"q": ds @ k.abs(), "k": ds.mT @ q.abs(), "v": heavy.mT @ do}
        sizes |= {name: part.transpose(1, 2) for name, part in parts.items()}
    return sizes


def _logits(call: Call) -> tuple[Tensor, ...]:
    """q and k as they meet [B, H, N, d], their logits, and without masks the same of absolute values."""
    call = float64(call)
    q, k, _ = call["qkv"].unflatten(-1, (3, call["num_heads"], -1)).permute(2, 0, 3, 1, 4)
    if norm := call.get("qk_norm"):
        eps = call.get("qk_norm_eps", 1e-6)
        q, k = (
            plain_ops._norm(t, call.get(f"{name}_norm_weight"), call.get(f"{name}_norm_bias"), eps, norm)
            for name, t in (("q", q), ("k", k))
        )
    if call.get("rope_cos") is not None:
        tables = [call[name] for name in ("rope_cos", "rope_sin", "rope_layout", "num_prefix_tokens")]
        q, k = (plain_ops._rotated(t, *tables) for t in (q, k))
    logits, large = (a @ b.mT * _scale(call) for a, b in ((q, k), (q.abs(), k.abs())))
    key_mask = call.get("key_mask")
    for mask in (call.get("attn_mask"), None if key_mask is None else key_mask[:, None, None]):
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return q, k, logits, large


def _scale(call: Call) -> float:
    head_dim = call["qkv"].shape[-1] // call["num_heads"] // 3
    return head_dim**-0.5 if call.get("scale") is None else call["scale"]


def _is_bare(call: Call) -> bool:
    return call.get("qk_norm") is None and call.get("rope_cos") is None


def _parts(gradients: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    dqkv = gradients.pop("qkv").unflatten(-1, (3, heads, -1))
    return dict(zip("qkv", dqkv.unbind(2), strict=True)) | gradients


def embed_within_contract(
    kernels: ModuleType, call: Call, grad: str | None = None, *, precision: str = "ieee", misalign: int = 0
) -> None:
    """The tokens, or with ``grad`` each gradient instead, by the parity contract."""
    call = on_device(call)
    found = embed_launch(kernels, call, grad, precision=precision, misalign=misalign)
    sizes = {}
    if grad is None:
        truth = {"out": plain("patch_embed", float64(call))}
        torchs = {"out": plain("patch_embed", call, precision)}
    else:
        given = GRADS[grad](plain("patch_embed", call))
        truth = plain_gradients("patch_embed", float64(call), given.double(), list(found))
        convolutions = (call, call | {"convolution": plain_ops.product_of_patches})
        both = [plain_gradients("patch_embed", c, given, list(found), precision) for c in convolutions]
        torchs = {name: [one[name] for one in both] for name in found}
        if given.dtype == torch.float32:
            sizes = _embed_sizes(call, given, [name for name in found if name != "images"])
    for name, value in found.items():
        kind = "op" if name in ("out", "images") else "param_grad"
        how = {"tf32": precision == "tf32", "backward": grad is not None, "scale": sizes.get(name)}
        check = judge(f"patch_embed, {name}", value, truth[name], torchs[name], kind=kind, **how)
        assert check.ok, check


def _embed_sizes(call: Call, grad: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The weights' gradients from absolute values: sums over many patches, of which little may be left."""
    wide = tensors(float64(call))
    unit = call["images"].double() / (255 if call["images"].dtype == torch.uint8 else 1)
    mean, std = (wide.pop(name, unit.new_tensor(none)) for name, none in (("mean", 0.0), ("std", 1.0)))
    wide["images"] = (unit - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    wide = {name: tensor.abs() for name, tensor in wide.items()}
    return plain_gradients("patch_embed", wide, grad.double().abs(), names)


def plain(op: str, call: Call, precision: str = "ieee") -> Tensor:
    """The op in torch's own functionals, on the call's device, float32 products in ``precision``."""
    with torch.device(DEVICE), products_in(precision), torch.no_grad():
        return getattr(plain_ops, op)(**call)


def plain_gradients(
    op: str, call: Call, grad: Tensor, names: list[str], precision: str = "ieee"
) -> dict[str, Tensor]:
    """The gradients of these inputs of the plain op, by name."""
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    with torch.device(DEVICE), products_in(precision):
        out = getattr(plain_ops, op)(**(call | leaves))
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """torch's own float32 products on a GPU in "ieee" or "tf32"."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
