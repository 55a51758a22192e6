"""More than 2^31 elements: offsets that int32 does not hold, compared with float64 on slices."""

import pytest
import torch
from kernel_checks import plain, plain_gradients
from kernel_launches import DEVICE
from op_cases import float64

from fastvit import ops, use_backend
from fastvit.contract import judge

FAR = 2**31


def right(name, found, truth, torchs, kind="op", **how):
    check = judge(name, found, truth, torchs, kind=kind, **how)
    assert check.ok, check


def picked(tensor, at):
    """Images of a batch, each by its own offset: torch's indexing of so large a tensor is not on trial."""
    return torch.stack([tensor[image] for image in at])


def attention_is_right(out, dqkv, call, grad):
    """Of a slice of the batch, by the contract."""
    right("out", out, plain("attention", float64(call)), plain("attention", call))
    (truth,), (own,) = (
        plain_gradients("attention", given, grad.to(given["qkv"].dtype), ["qkv"]).values()
        for given in (float64(call), call)
    )
    parts = (tensor.chunk(3, dim=-1) for tensor in (dqkv, truth, own))
    for part, kind, *tensors in zip("qkv", ("dq", "op", "op"), *parts, strict=True):
        right(f"d{part}", *tensors, kind, backward=True)


def attention(batch, tokens, heads, head_dim, device, dtype):
    """The call, its gradient, and what the kernels make of both."""
    width = heads * head_dim
    qkv = torch.empty(batch, tokens, 3 * width, dtype=dtype, device=device).normal_().requires_grad_()
    with use_backend("triton"):
        out = ops.attention(qkv, heads)
        grad = torch.empty_like(out).normal_()
        (dqkv,) = torch.autograd.grad(out, qkv, grad)
    return {"qkv": qkv.detach(), "num_heads": heads}, grad, out.detach(), dqkv


def judged_attention(*sizes):
    call, grad, out, dqkv = attention(*sizes)
    for at in (0, len(out) // 2, len(out) - 1):
        here = slice(at, at + 1)
        attention_is_right(out[here], dqkv[here], call | {"qkv": call["qkv"][here]}, grad[here])


def patch_embed(batch, images, device, dtype, side=224, patch=16, width=768):
    """The same. Only the images that are looked at have a gradient: the oracle would need all in float64."""
    given = torch.empty(
        batch, 3, side, side, dtype=dtype if images == "float" else torch.uint8, device=device
    )
    given = given.normal_() if images == "float" else given.random_(0, 256)
    call = {
        "weight": torch.randn(width, 3, patch, patch, device=device).div(3**0.5 * patch).to(dtype),
        "bias": torch.randn(width, device=device).to(dtype),
        "pos_embed": torch.randn(1, 1 + (side // patch) ** 2, width, device=device).to(dtype),
        "prefix": torch.randn(1, 1, width, device=device).to(dtype),
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in call.items()}
    leaves["images"] = given.requires_grad_(images == "float")
    with use_backend("triton"):
        out = ops.patch_embed(**leaves)
        grad = torch.zeros_like(out)
        for image in looked_at(batch):
            grad[image].normal_()
        names = [name for name, tensor in leaves.items() if tensor.requires_grad]
        found = torch.autograd.grad(out, [leaves[name] for name in names], grad)
    leaves = {name: tensor.detach() for name, tensor in leaves.items()}
    return leaves, grad, out.detach(), dict(zip(names, found, strict=True))


def looked_at(batch):
    return 0, batch // 2, batch - 1


def judged_patch_embed(batch, images, *how, **sizes):
    call, grad, out, found = patch_embed(batch, images, *how, **sizes)
    at, names = looked_at(batch), list(found)
    few = call | {"images": picked(call["images"], at)}
    right("out", picked(out, at), plain("patch_embed", float64(few)), plain("patch_embed", few))
    truth = plain_gradients("patch_embed", float64(few), picked(grad, at).double(), names)
    torchs = plain_gradients("patch_embed", few, picked(grad, at), names)
    if images == "float":
        assert not found["images"][1].count_nonzero()
        found["images"] = picked(found["images"], at)
    for name in names:
        kind = "op" if name == "images" else "param_grad"
        right(f"d{name}", found[name], truth[name], torchs[name], kind, backward=True)


ATTENTION = (FAR // (197 * 3 * 12 * 64) + 2, 197, 12, 64)
IMAGES = FAR // (3 * 224 * 224) + 2


@pytest.mark.needs(gigabytes=20)
def test_attention(gpu, room):
    judged_attention(*ATTENTION, gpu, torch.bfloat16)


# Tokens and their gradient have more than 2^31 elements too.
@pytest.mark.needs(gigabytes=30)
@pytest.mark.parametrize("images", ["uint8", "float"])
def test_patch_embed(images, gpu, room):
    judged_patch_embed(IMAGES, images, gpu, torch.bfloat16)


# The same bodies in the interpreter, or on any GPU, at a size that fits everywhere.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_same_on_few_elements(dtype):
    judged_attention(4, 17, 2, 32, DEVICE, dtype)
    for images in ("uint8", "float"):
        judged_patch_embed(4, images, DEVICE, dtype, side=16, patch=4, width=24)
