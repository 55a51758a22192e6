"""How the Triton kernels are held to the contract: on a GPU, or else in Triton's interpreter.

Every launch here runs in red zones: its inputs lie in slabs of NaN, its outputs between canaries, and all of
an output must have been written. Each check raises ``AssertionError`` and takes the package of kernels, so
that mutants can fail it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import plain_ops
import torch
from memory import Canaries, guarded, poisoned_empty
from op_cases import Call, converted, float64, tensors
from torch import Tensor

from fastvit.contract import HALF, judge, judge_saved

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter is silently wrong in bfloat16, and tf32 is a GPU's.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
PRECISIONS = ("ieee", "tf32") if GPU else ("ieee",)

ATTENTION_OPTIONS = (
    *("attn_mask", "key_mask", "qk_norm", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"),
    *("qk_norm_eps", "rope_cos", "rope_sin", "rope_layout", "num_prefix_tokens"),
)
NORM_WEIGHTS = ATTENTION_OPTIONS[3:7]
EMBED_INPUTS = ("images", "weight", "bias", "pos_embed", "prefix")

# Gradients as they arrive: from the next layer, from .sum() (every stride 0), from a transposition.
GRADS = {
    "contiguous": lambda out: _numbers(out.shape).to(out),
    "sum": lambda out: torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape),
    "transposed": lambda out: _numbers(out.mT.shape).to(out).mT,
}
# Tiles of unequal sides, so that none stands in for another, and small, so that few tokens make several.
FORMS = {
    "resident": {"RESIDENT": 1, "BLOCK_M": 16, "BLOCK_N": 16},
    "online": {"RESIDENT": 0, "BLOCK_M": 32, "BLOCK_N": 16},
}
BACKWARD_TILE = {"KEYS_N": 32, "KEYS_M": 16, "QUERIES_M": 16, "QUERIES_N": 32}


def on_device(call: Call) -> Call:
    return converted(call, lambda tensor: tensor.to(DEVICE))


@contextmanager
def attention_form(kernels: ModuleType, form: str | None) -> Iterator[None]:
    """Attention in one of FORMS; None leaves it to the tables."""
    if form is None:
        yield
        return

    def tile(kernel, *_, tokens, **__):
        chosen = FORMS[form] if kernel == "attention_fwd" else BACKWARD_TILE
        # The interpreter takes its time for each tile, whatever its size.
        larger = 1 if GPU or tokens <= 64 else 4
        constants = {name: size if name == "RESIDENT" else size * larger for name, size in chosen.items()}
        return kernels.tiles.Tile(constants, 4, 2, "modelled")

    with mock.patch.object(kernels.attention, "tile", tile):
        yield


@contextmanager
def red_zones() -> Iterator[Canaries]:
    """``poisoned_empty``, but for tensors of no element, which the interpreter lays over tensors of ours."""
    with poisoned_empty() as memory:
        like = memory.like
        memory.like = lambda template, **how: like(template, **how) if template.numel() else template
        yield memory


def attention_launch(
    kernels: ModuleType,
    call: Call,
    grad: str | Tensor | None = None,
    *,
    precision: str = "ieee",
    misalign: int = 0,
    layouts: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """What the launchers make of the public op's call: out and lse and, with ``grad``, every gradient.

    ``layouts`` makes q, k and v tensors of their own, each [B, N, H, d] laid out by its function.
    """
    call = converted(call, lambda tensor: guarded(tensor, misalign=misalign))
    parts = call["qkv"].unflatten(-1, (3, call["num_heads"], -1)).unbind(2)
    if layouts:
        parts = [
            guarded(layout(part), misalign=misalign) for layout, part in zip(layouts, parts, strict=True)
        ]
    options = {name: call[name] for name in ATTENTION_OPTIONS if name in call} | {"precision": precision}
    options["scale"] = parts[0].shape[-1] ** -0.5 if call.get("scale") is None else call["scale"]
    with red_zones() as memory:
        out, lse = kernels.attention.attention_fwd(*parts, with_lse=True, **options)
        memory.check_written()
        results = {"out": out, "lse": lse}
        if grad is not None:
            norms = call.get("qk_norm") is not None
            given = guarded(GRADS[grad](out) if isinstance(grad, str) else grad, misalign=misalign)
            dqkv, *of_norms = kernels.attention.attention_bwd(
                given, *parts, out, lse, norm_grads=norms, **options
            )
            memory.check_written()
            results |= zip("qkv", dqkv.unbind(2), strict=True)
            results |= {
                name: gradient.to(call[name].dtype)
                for name, gradient in zip(NORM_WEIGHTS, of_norms, strict=True)
                if call.get(name) is not None
            }
    return results


def attention_within_contract(
    kernels: ModuleType, call: Call, grad: str | None = None, *, precision: str = "ieee", **memory
) -> None:
    """Output and log-sum-exp, or with ``grad`` each gradient instead, by the parity contract."""
    call = on_device(call)
    found = attention_launch(kernels, call, grad, precision=precision, **memory)
    out, lse = found.pop("out"), found.pop("lse")
    floor_only = call["qkv"].shape[1] <= 2
    how = {"tf32": precision == "tf32", "floor_only": floor_only, "backward": grad is not None}
    given = None if grad is None else GRADS[grad](out)
    sizes = attention_sizes(call, given) if floor_only or out.dtype == torch.float32 else {}
    if grad is None:
        truth, torchs = plain("attention", float64(call)), plain("attention", call, precision)
        check = judge("out", out, truth, torchs, kind="op", scale=sizes.get("out"), **how)
        assert check.ok, check
        # In half precision normalised or rotated q and k are rounded before they meet.
        if precision == "ieee" and (out.dtype not in HALF or _is_bare(call)):
            logits, large = _logits(call)
            # An lse near zero is measured by what cancelled: the logits' products, and log N.
            size = (logits.softmax(-1).nan_to_num() * large).sum(-1) + lse.shape[-1] ** 0.5
            check = judge_saved("lse", lse, logits.logsumexp(-1), scale=size.clamp(max=1e3))
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
    """How large output and gradients would be if nothing cancelled; nothing for a call with norm or rotation.

    The products taken with absolute values in float64: P max(1, |q||k| scale) |v|, and the gradients alike.
    """
    if not _is_bare(call):
        return {}
    q, k, v = call["qkv"].double().unflatten(-1, (3, call["num_heads"], -1)).permute(2, 0, 3, 1, 4).abs()
    logits, large = _logits(call)
    weights = logits.softmax(-1).nan_to_num()
    heavy = weights * large.clamp(min=1)
    sizes = {"out": (heavy @ v).transpose(1, 2).flatten(2)}
    if grad is not None:
        do = grad.double().unflatten(-1, (call["num_heads"], -1)).transpose(1, 2).abs()
        dp = do @ v.mT
        ds = heavy * (dp + (dp * weights).sum(-1, keepdim=True)) * _scale(call)
        parts = {"q": ds @ k, "k": ds.mT @ q, "v": heavy.mT @ do}
        sizes |= {name: part.transpose(1, 2) for name, part in parts.items()}
    return sizes


def _logits(call: Call) -> tuple[Tensor, Tensor]:
    """The logits in float64 and, without masks, the same of absolute values [B, H, N, N]."""
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
    return logits, large


def _scale(call: Call) -> float:
    head_dim = call["qkv"].shape[-1] // call["num_heads"] // 3
    return head_dim**-0.5 if call.get("scale") is None else call["scale"]


def _is_bare(call: Call) -> bool:
    return call.get("qk_norm") is None and call.get("rope_cos") is None


def _parts(gradients: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    dqkv = gradients.pop("qkv").unflatten(-1, (3, heads, -1))
    return dict(zip("qkv", dqkv.unbind(2), strict=True)) | gradients


def embed_launch(
    kernels: ModuleType, call: Call, grad: str | None = None, *, precision: str = "ieee", misalign: int = 0
) -> dict[str, Tensor]:
    """What patch_embed's launchers make of the public op's call: out or, with ``grad``, every gradient."""
    call = converted(call, lambda tensor: guarded(tensor, misalign=misalign))
    images, weight, bias, pos_embed, prefix = (call.get(name) for name in EMBED_INPUTS)
    options = {name: call.get(name) for name in ("mean", "std")} | {"precision": precision}
    with red_zones() as memory:
        out = kernels.patch_embed.patch_embed_fwd(images, weight, bias, pos_embed, prefix, **options)
        memory.check_written()
        if grad is None:
            return {"out": out}
        needs = [call.get(name) is not None and call[name].is_floating_point() for name in EMBED_INPUTS]
        gradients = kernels.patch_embed.patch_embed_bwd(
            guarded(GRADS[grad](out), misalign=misalign),
            *(images, weight),
            num_prefix=0 if prefix is None else prefix.shape[1],
            pos_embed_rows=0 if pos_embed is None else pos_embed.shape[1],
            needs=tuple(needs),
            **options,
        )
        memory.check_written()
    assert [gradient is not None for gradient in gradients] == needs
    return {name: given for name, given in zip(EMBED_INPUTS, gradients, strict=True) if given is not None}


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
        torchs = plain_gradients("patch_embed", call, given, list(found), precision)
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


def _numbers(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
