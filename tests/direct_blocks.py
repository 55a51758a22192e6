"""Accelerated blocks whose ops run on kernels, for tests of `fastvit.layers.direct`."""

from contextlib import contextmanager
from unittest import mock

import torch
from timm.models.vision_transformer import Block
from torch import nn

import fastvit
from fastvit.layers import direct
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
        return reference(q, k, v, **options), None

    def packed(qkv, num_heads, options):
        views = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return of_views(*views, with_lse=False, **options._asdict())[0]

    with mock.patch.multiple(attention, attention_fwd=of_views, attention_packed=packed):
        yield


def ordinary(call):
    with mock.patch.object(direct, "_kind", return_value=None):
        return call()
