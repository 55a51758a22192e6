"""What a kernel launches for a call, and where its results will be: planned with the table's tiles of now.

Inputs are a case's, by name; on the meta device a plan is all that can be had, and can be compiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import attention, patch_embed_plan
from fastvit_kernels.attention_options import Options
from fastvit_kernels.launch import Launch
from fastvit_kernels.patch_embed_projection import flatten_weight, image_layout, project

from ..op_bench import Inputs, Results

Planned = tuple[list[Launch], Results]


def _attention_inputs(inputs: Inputs, precision: str) -> tuple[tuple[Tensor, ...], Options]:
    heads = inputs["num_heads"]
    q, k, v = inputs["qkv"].unflatten(-1, (3, heads, -1)).unbind(2)
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5}
    options |= {name: inputs[name] for name in Options._fields if name in inputs}
    return (q, k, v), Options(**options)._replace(precision=precision)


def _attention_fwd(inputs: Inputs, precision: str, arch: str) -> Planned:
    views, options = _attention_inputs(inputs, precision)
    out = torch.empty_like(inputs["grad"])
    return [attention.plan_fwd(*views, out, None, options, arch)], (out,)


def _attention_bwd(inputs: Inputs, precision: str, arch: str) -> Planned:
    (q, k, v), options = _attention_inputs(inputs, precision)
    grad, dqkv = inputs["grad"], torch.empty_like(inputs["qkv"])
    batch, tokens, heads, head_dim = q.shape
    out, lse = torch.empty_like(grad), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if not q.is_meta:
        attention.plan_fwd(q, k, v, out, lse, options, arch)()
    into = dqkv.view(batch, tokens, 3, heads, head_dim)
    facts = q.new_empty(batch, heads, tokens, 4, dtype=torch.float32)
    return list(attention.plan_bwd(grad, q, k, v, out, lse, into, facts, (), options, arch)), (dqkv,)


def _patch_embed_fwd(inputs: Inputs, precision: str, arch: str) -> Planned:
    images, weight, out = inputs["images"], inputs["weight"], torch.empty_like(inputs["grad"])
    projection = project(images, weight, inputs["bias"], None, None)
    beside = (inputs["pos_embed"], inputs["prefix"], out, precision)
    return [patch_embed_plan.fwd(arch, images, weight.shape[2:], projection, *beside)], (out,)


def _patch_embed_dweight(inputs: Inputs, precision: str, arch: str) -> Planned:
    grad, images, weight = inputs["grad"], inputs["images"], inputs["weight"]
    flat, size = torch.empty_like(weight.flatten(1)), weight[0].numel()
    splits = patch_embed_plan.dweight_splits(arch, grad, size, 1, precision)
    partials = flat[None] if splits == 1 else flat.new_empty(splits, *flat.shape, dtype=torch.float32)
    colours = (None, None)
    how = (weight.shape[2:], *colours, partials, 1, precision)
    launches = [patch_embed_plan.dweight(arch, grad, images, *how)]
    if splits > 1:
        launches.append(patch_embed_plan.sum_rows(partials, flat))
    return launches, (flat.view(weight.shape),)


def _patch_embed_dimages(inputs: Inputs, precision: str, arch: str) -> Planned:
    grad, weight, dimages = inputs["grad"], inputs["weight"], torch.empty_like(inputs["images"])
    flat = flatten_weight(weight, image_layout(dimages))
    how = (weight.shape[2:], None, dimages, 1, precision)
    return [patch_embed_plan.dimages(arch, grad, flat, *how)], (dimages,)


PLANS: dict[str, Callable[[Inputs, str, str], Planned]] = {
    "attention_fwd": _attention_fwd,
    # A tile is tried within the whole backward, which is what is judged, and what must be faster.
    "attention_bwd_heads": _attention_bwd,
    "attention_bwd_keys": _attention_bwd,
    "attention_bwd_queries": _attention_bwd,
    "patch_embed_fwd": _patch_embed_fwd,
    "patch_embed_dweight": _patch_embed_dweight,
    "patch_embed_dimages": _patch_embed_dimages,
}
