"""More than 2^31 elements: offsets that int32 does not hold, compared with float64 on slices."""

import pytest
import torch
from kernel_checks import plain, plain_gradients
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


def judged_attention(batch, tokens, heads, head_dim, device, dtype):
    width = heads * head_dim
    qkv = torch.empty(batch, tokens, 3 * width, dtype=dtype, device=device).normal_().requires_grad_()
    with use_backend("triton"):
        out = ops.attention(qkv, heads)
        grad = torch.empty_like(out).normal_()
        (dqkv,) = torch.autograd.grad(out, qkv, grad)
    for at in (0, batch // 2, batch - 1):
        here = slice(at, at + 1)
        call = {"qkv": qkv.detach()[here], "num_heads": heads}
        attention_is_right(out.detach()[here], dqkv[here], call, grad[here])


def judged_patch_embed(batch, images, device, dtype, side=224, patch=16, width=768):
    """Only the images that are looked at have a gradient, or the oracle would need them all in float64."""
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
    at = (0, batch // 2, batch - 1)
    with use_backend("triton"):
        out = ops.patch_embed(**leaves)
        grad = torch.zeros_like(out)
        for image in at:
            grad[image].normal_()
        names = [name for name, tensor in leaves.items() if tensor.requires_grad]
        found = torch.autograd.grad(out, [leaves[name] for name in names], grad)
    found = dict(zip(names, found, strict=True))
    few = {name: tensor.detach() for name, tensor in leaves.items()} | {"images": picked(given.detach(), at)}
    right("out", picked(out.detach(), at), plain("patch_embed", float64(few)), plain("patch_embed", few))
    truth = plain_gradients("patch_embed", float64(few), picked(grad, at).double(), names)
    torchs = plain_gradients("patch_embed", few, picked(grad, at), names)
    if images == "float":
        assert not found["images"][1].count_nonzero()
        found["images"] = picked(found["images"], at)
    for name in names:
        kind = "op" if name == "images" else "param_grad"
        right(f"d{name}", found[name], truth[name], torchs[name], kind, backward=True)


def test_attention(gpu, room):
    batch = FAR // (197 * 3 * 12 * 64) + 2
    room(20)
    judged_attention(batch, 197, 12, 64, gpu, torch.bfloat16)


# Tokens and their gradient have more than 2^31 elements too.
@pytest.mark.parametrize("images", ["uint8", "float"])
def test_patch_embed(images, gpu, room):
    batch = FAR // (3 * 224 * 224) + 2
    room(30)
    judged_patch_embed(batch, images, gpu, torch.bfloat16)


# The same bodies in the interpreter, or on any GPU, at a size that fits everywhere.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_same_on_few_elements(dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judged_attention(4, 17, 2, 32, device, dtype)
    for images in ("uint8", "float"):
        judged_patch_embed(4, images, device, dtype, side=16, patch=4, width=24)
