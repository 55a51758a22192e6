"""Accelerated blocks whose ops run on kernels, for tests of `fastvit.layers.direct`."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch
from timm.models.vision_transformer import Block
from torch import nn

import fastvit
from fastvit.layers import direct
from fastvit.ops.attention_triton import NORMS
from fastvit.reference import attention as reference
from fastvit_kernels import attention

KERNELS = {"attention": "triton", **dict.fromkeys(direct.KERNELS.keys() - {"attention"}, "cpp")}
DIM, HEADS, TOKENS = 32, 2, 5


def block(mode="inference", dim=DIM, **how):
    torch.manual_seed(0)
    made = Block(dim, HEADS, **{"qkv_bias": True, **how}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return fastvit.accelerate(made, mode)


def tokens(batch=1, dim=DIM, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, TOKENS, dim).to(dtype)


@contextmanager
def kernels_by_torch():
    """The Triton kernels' numbers by torch: the interpreter takes its time."""

    def of_views(q, k, v, *, with_lse, precision, **options):
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32) if with_lse else None
        return reference(q, k, v, **options), lse

    def gradients(grad_out, q, k, v, out, lse, *, norm_grads, precision, **options):
        norms = [options[name] for name in NORMS] if norm_grads else [None] * 4
        leaves = [t.detach().requires_grad_() for t in (q, k, v, *norms) if t is not None]
        q, k, v, *given = leaves
        given = iter(given)
        options |= {n: next(given) for n, t in zip(NORMS, norms, strict=True) if t is not None}

        def differentiated():
            return torch.autograd.grad(reference(q, k, v, **options), leaves, grad_out)

        # Below autograd there are no gradients; a thread of its own is not.
        with ThreadPoolExecutor(1) as pool:
            found = iter(pool.submit(differentiated).result())
        dqkv = torch.stack([next(found) for _ in range(3)], 2)
        return dqkv, *[None if norm is None else next(found) for norm in norms]

    def packed(qkv, num_heads, options):
        views = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return of_views(*views, with_lse=False, **options._asdict())[0]

    with mock.patch.multiple(
        attention, attention_fwd=of_views, attention_packed=packed, attention_bwd=gradients
    ):
        yield


def ordinary(call):
    with mock.patch.object(direct, "_kind", return_value=None):
        return call()
