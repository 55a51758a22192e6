"""The launchers of the GPU that is made up: launches are checked and noted, numbers are the reference's."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from fake_gpu import planted


def launches(launch):
    """Checked, and noted by their kernels' names."""

    def note(self):
        launch.check_grid(self.grid)
        if (file := os.environ.get("FAKE_GPU_LAUNCHES")) and 0 not in self.grid:
            with open(file, "a") as lines:
                lines.write(f"{self.kernel.__name__}\n")

    launch.Launch.__call__ = note
    launch.arch_of = lambda device: "sm_90"


def unwatched(launcher):
    """The launcher, whose tensors no test finds unwritten: no kernel writes what lies between two."""
    import torch

    plain = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    new_empty = torch.Tensor.new_empty

    def launched(*args, **how):
        with mock.patch.multiple(torch, **plain), mock.patch.object(torch.Tensor, "new_empty", new_empty):
            return launcher(*args, **how)

    return launched


NORMS = ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")


def attention(kernels):
    """The launchers, whose results are then the reference's."""
    import torch

    from fastvit.reference import attention as reference

    forward, backward = map(unwatched, (kernels.attention_fwd, kernels.attention_bwd))

    def attention_fwd(q, k, v, *, with_lse=False, **options):
        out, lse = forward(q, k, v, with_lse=with_lse, **options)
        known = _of_torch(options)
        with torch.no_grad():
            out.copy_(reference(q, k, v, **known))
            if with_lse:
                lse.copy_(_logits(q, k, v, known).logsumexp(-1))
        return planted("attention_fwd", (out, lse))

    def attention_bwd(grad_out, q, k, v, out, lse, *, norm_grads=False, **options):
        dqkv, *of_norms = backward(grad_out, q, k, v, out, lse, norm_grads=norm_grads, **options)
        known = _of_torch(options)
        leaves = {name: known[name] for name in NORMS if norm_grads and known.get(name) is not None}
        leaves = {name: t.detach().requires_grad_() for name, t in {"q": q, "k": k, "v": v, **leaves}.items()}
        found = _gradients(lambda: reference(**known | leaves), list(leaves.values()), grad_out)
        found = dict(zip(leaves, found, strict=True))
        dqkv.copy_(torch.stack([found[name] for name in "qkv"], 2))
        if norm_grads:
            of_norms = [found[name].float() if name in found else None for name in NORMS]
        return planted("attention_bwd", (dqkv, *of_norms))

    kernels.attention_fwd, kernels.attention_bwd = attention_fwd, attention_bwd


def _gradients(forward, leaves, grad):
    """In a thread of its own: in this one the dispatcher may be below autograd."""
    import torch

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: torch.autograd.grad(forward(), leaves, grad)).result()


def _of_torch(options):
    return {name: value for name, value in options.items() if name != "precision"}


def _logits(q, k, v, options):
    import torch

    sys.path.append(str(Path(__file__).parent.parent))
    import kernel_checks

    qkv = torch.stack([q, k, v], 2).flatten(2)
    defaults = {"rope_layout": "half", "num_prefix_tokens": 0}
    return kernel_checks._logits(defaults | options | {"qkv": qkv, "num_heads": q.shape[2]})[2]


def patch_embed(kernels):
    import torch

    from fastvit.reference import patch_embed as reference

    forward, backward = map(unwatched, (kernels.patch_embed_fwd, kernels.patch_embed_bwd))

    def patch_embed_fwd(images, weight, bias=None, pos_embed=None, prefix=None, **options):
        out = forward(images, weight, bias, pos_embed, prefix, **options)
        colours = {name: options.get(name) for name in ("mean", "std")}
        with torch.no_grad():
            out.copy_(reference(images, weight, bias, pos_embed, prefix, **colours))
        return planted("patch_embed_fwd", (out,))[0]

    def patch_embed_bwd(grad_out, images, weight, *, num_prefix, pos_embed_rows, needs, **options):
        sizes = {"num_prefix": num_prefix, "pos_embed_rows": pos_embed_rows, "needs": needs}
        results = backward(grad_out, images, weight, **sizes, **options)
        colours = {name: options.get(name) for name in ("mean", "std")}
        width, patches = weight.shape[0], grad_out.shape[1] - num_prefix
        zeros = weight.new_zeros
        given = [images, weight, zeros(width) if needs[2] else None]
        given += [zeros(1, pos_embed_rows, width) if pos_embed_rows else None]
        given += [zeros(1, num_prefix, width) if num_prefix else None]
        assert pos_embed_rows in (0, patches, patches + num_prefix)
        leaves = [
            t if t is None or not n else t.detach().requires_grad_()
            for t, n in zip(given, needs, strict=True)
        ]
        wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        found = iter(_gradients(lambda: reference(*leaves, **colours), wanted, grad_out))
        for result, needed in zip(results, needs, strict=True):
            if needed:
                result.copy_(next(found))
        return planted("patch_embed_bwd", tuple(results))

    kernels.patch_embed_fwd, kernels.patch_embed_bwd = patch_embed_fwd, patch_embed_bwd
