"""patch_embed on the Triton kernels: the registered ops, their shapes for compilers, and their gradients.

    fastvit::patch_embed_fwd(images, weight, ...) -> tokens [B, P + N, D]
    fastvit::patch_embed_bwd(grad_out, images, weight, ..., needs) -> the gradients that are needed, in order

What the kernels read of the weight (mean and std folded in, channels last beside such images) is made of it
at each call: it is small, and a copy would have to follow the weight. float32 products are in tf32 if torch's
convolution would use it, which is looked up at each call.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from ..call_facts import compute_dtype, needs_gradient, tf32
from . import registration

INPUTS = ("images", "weight", "bias", "pos_embed", "prefix")


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """The public op's call on the kernels; under autocast it runs in low precision, as a convolution does."""
    dtype = compute_dtype(weight)
    images = images if images.dtype == torch.uint8 else images.to(dtype)
    inputs = (images, weight.to(dtype), None if bias is None else bias.to(dtype), pos_embed, prefix)
    if registration.records_gradients(*inputs):
        return _PatchEmbed.apply(*inputs, mean, std)
    return registration.call(_fwd, *inputs, mean, std)


class _PatchEmbed(Function):
    @staticmethod
    def forward(ctx, images, weight, bias, pos_embed, prefix, mean, std):
        ctx.save_for_backward(images, weight, mean, std)
        ctx.num_prefix = 0 if prefix is None else prefix.shape[1]
        ctx.pos_embed_rows = 0 if pos_embed is None else pos_embed.shape[1]
        return registration.call(_fwd, images, weight, bias, pos_embed, prefix, mean, std)

    @staticmethod
    @registration.once_differentiable
    def backward(ctx, grad_out):
        images, weight, mean, std = ctx.saved_tensors
        *needs, mean_needed, std_needed = ctx.needs_input_grad
        if mean_needed or std_needed:
            raise NotImplementedError("fastvit::patch_embed_fwd gives no gradient to mean and std")
        sizes = (ctx.num_prefix, ctx.pos_embed_rows)
        given = iter(registration.call(_bwd, grad_out, images, weight, *sizes, mean, std, needs))
        return *[next(given) if needed else None for needed in needs], None, None


def _precision(weight: Tensor) -> str:
    return "tf32" if weight.dtype == torch.float32 and tf32("patch_embed") else "ieee"


def _exact(images: Tensor, weight: Tensor) -> Tensor:
    """Bytes as floats where products are to be exact: Triton 3.6 rounds a dot of bytes to tf32 on sm_100."""
    exact = weight.dtype == torch.float32 and _precision(weight) == "ieee"
    return images.float() / 255 if exact and images.dtype == torch.uint8 else images


def _fwd_kernels(images, weight, bias, pos_embed, prefix, mean, std):
    from fastvit_kernels import patch_embed as kernels

    return kernels.patch_embed_fwd(
        *(_exact(images, weight), weight, bias, pos_embed, prefix),
        mean=mean,
        std=std,
        precision=_precision(weight),
    )


def _fwd_shapes(images, weight, bias, pos_embed, prefix, mean, std):
    (batch, _, height, width), (dim, _, ph, pw) = images.shape, weight.shape
    num_prefix = 0 if prefix is None else prefix.shape[1]
    return weight.new_empty(batch, num_prefix + (height // ph) * (width // pw), dim)


def _fwd_autograd(images, weight, bias, pos_embed, prefix, mean, std):
    inputs = (images, weight, bias, pos_embed, prefix, mean, std)
    if needs_gradient(*inputs):
        return _PatchEmbed.apply(*inputs)
    return registration.below_autograd(_fwd, *inputs)


def _bwd_kernels(grad_out, images, weight, num_prefix, pos_embed_rows, mean, std, needs):
    from fastvit_kernels import patch_embed as kernels

    # A transposed gradient is copied: read across, it took more registers than there are.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    gradients = kernels.patch_embed_bwd(
        *(grad_out, _exact(images, weight), weight),
        num_prefix=num_prefix,
        pos_embed_rows=pos_embed_rows,
        needs=tuple(needs),
        mean=mean,
        std=std,
        precision=_precision(weight),
    )
    return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


def _bwd_shapes(grad_out, images, weight, num_prefix, pos_embed_rows, mean, std, needs):
    dim = weight.shape[0]
    shapes = {"bias": (dim,), "pos_embed": (1, pos_embed_rows, dim), "prefix": (1, num_prefix, dim)}
    gradients = []
    for name, needed in zip(INPUTS, needs, strict=True):
        if needed and name == "images":
            gradients.append(torch.empty_like(images))
        elif needed:
            gradients.append(
                _weight_shape(images, weight) if name == "weight" else weight.new_empty(shapes[name])
            )
    return gradients


def _weight_shape(images: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient lies in memory as the images do."""
    dim, channels, ph, pw = weight.shape
    if images.stride(3) != 1 and images.stride(1) == 1 and images.stride(3) == channels:
        return weight.new_empty(dim, ph, pw, channels).permute(0, 3, 1, 2)
    return weight.new_empty(dim, channels, ph, pw)


_fwd = registration.register(
    "patch_embed_fwd(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
    "Tensor? mean, Tensor? std) -> Tensor",
    _fwd_kernels,
    _fwd_shapes,
    _fwd_autograd,
    compiled=False,
)
_bwd = registration.register(
    "patch_embed_bwd(Tensor grad_out, Tensor images, Tensor weight, int num_prefix, int pos_embed_rows, "
    "Tensor? mean, Tensor? std, bool[5] needs) -> Tensor[]",
    _bwd_kernels,
    _bwd_shapes,
    compiled=False,
)
