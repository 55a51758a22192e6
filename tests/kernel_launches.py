"""Launches of the Triton kernels in red zones: on a GPU, or else in Triton's interpreter.

Inputs lie in slabs of NaN, outputs between canaries, and all of an output must have been written. The package
of kernels is an argument, so that mutants can be launched too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
import triton.language as tl
from memory import Canaries, guarded, poisoned_empty
from op_cases import Call, converted
from op_checks import GRADS
from torch import Tensor
from triton.runtime import interpreter

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

# Tiles of unequal sides, so that none stands in for another, and small, so that few tokens make several. They
# take the tail first, and the safe table's take it last.
FORMS = {
    "resident": {"RESIDENT": 4, "BLOCK_M": 16, "BLOCK_N": 16, "TAIL_FIRST": 0},
    "online": {"RESIDENT": 0, "BLOCK_M": 32, "BLOCK_N": 16, "TAIL_FIRST": 1},
}
BACKWARD_TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "TAIL_FIRST": 1}
HEADS_TILE = {"BLOCK_M": 16, "BLOCK_N": 32}


def on_device(call: Call) -> Call:
    return converted(call, lambda tensor: tensor.to(DEVICE))


@contextmanager
def attention_form(kernels: ModuleType, form: str | None) -> Iterator[None]:
    """Attention in one of FORMS, or "heads": its backward in one launch. None leaves it to the tables."""
    if form is None:
        yield
        return

    def tile(kernel, *_, tokens, **__):
        if kernel == "attention_bwd_heads":
            larger = 4 if tokens > 208 else 2 if GPU or tokens > 64 else 1
            constants = {name: size * larger for name, size in HEADS_TILE.items()}
            constants["ONE_LAUNCH"] = int(form == "heads")
            return kernels.tiles.Tile(constants, 8 if larger == 4 else 4, 1, "modelled")
        chosen = FORMS.get(form, FORMS["resident"]) if kernel == "attention_fwd" else BACKWARD_TILE
        # The interpreter takes its time for each tile, whatever its size.
        larger = 1 if GPU or tokens <= 64 else 4
        constants = {name: size * larger if "BLOCK" in name else size for name, size in chosen.items()}
        return kernels.tiles.Tile(constants, 4, 2, "modelled")

    kernels.launch_cache.forget()
    try:
        with mock.patch.object(kernels.attention, "tile", tile):
            yield
    finally:
        kernels.launch_cache.forget()


@contextmanager
def red_zones() -> Iterator[Canaries]:
    """``poisoned_empty``, but for tensors of no element, which the interpreter lays over tensors of ours."""
    with poisoned_empty() as memory, mock.patch.object(interpreter, "_patch_lang", _patch_lang_once):
        like = memory.like
        memory.like = lambda template, **how: like(template, **how) if template.numel() else template
        yield memory


def _patch_lang_once(function, patch=interpreter._patch_lang):
    """The interpreter looks through all of triton.language at every call, where once a launch is enough."""
    seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
    patched = seen and not any(tl.core.is_builtin(module.load) for module in seen)
    return interpreter._LangPatchScope() if patched else patch(function)


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
