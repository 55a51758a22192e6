"""The handwritten digits that scikit-learn ships, and a small ViT for them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

SHARE = 0.8  # of the images that are trained on


class Digits(NamedTuple):
    """Images [M, 1, 8, 8] of zero mean and unit deviation, and labels [M], to train on and to test with."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int = 0) -> Digits:
    """The 1797 images in an order that the seed draws, split once."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(data.target)[order]
    count = int(SHARE * len(images))
    images = (images - images[:count].mean()) / images[:count].std()
    return Digits(images[:count], labels[:count], images[count:], labels[count:])


def build(seed: int = 0, **options) -> nn.Module:
    """timm's VisionTransformer on 16 patches, 64 wide, 3 deep, drawn from the seed."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    sizes |= {"embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False, "global_pool": "avg"}
    model = VisionTransformer(**sizes | options, weight_init="moco")
    # A few steps are all that there are: positions and patches start at the size of what they are added to.
    nn.init.trunc_normal_(model.patch_embed.proj.weight, std=0.5)
    nn.init.trunc_normal_(model.pos_embed, std=0.2)
    return model


def noisy(images: Tensor, drawn: torch.Generator) -> Tensor:
    """With noise of 0.3 deviations, without which so small a set is learned by heart."""
    return images + 0.3 * torch.randn(images.shape, generator=drawn)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of test images that are told right."""
    training = model.training
    right = model.eval()(digits.test_images).argmax(-1) == digits.test_labels
    model.train(training)
    return right.float().mean().item()
