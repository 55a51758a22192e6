"""The activations that vision transformers use, by the names of the field."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


# "gelu" is the exact, erf form (arXiv 1606.08415). The approximations have names of their own and are
# never inferred: the tanh form differs from erf by up to 4.7e-4, which is 4000 times fp32's precision.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}
# Gated: act(gate) * value (arXiv 2002.05202).
GATED = {"swiglu": F.silu}
