"""A model of each library, small, with weights that matter, for what is done to all of them."""

import copy
import functools

import torch
from accelerated import images, pair
from huggingface_models import build
from library_models import open_clip_model, torchvision_model
from library_parity import named
from torch import Tensor, nn

from fastvit.verification import randomize

FAMILIES = {
    "timm": lambda: (pair("vit")[0], {"x": images()}),
    "timm's Eva": lambda: (pair("eva")[0], {"x": images()}),
    "transformers": lambda: build("dinov2"),
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
}


@functools.cache
def _made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, call = FAMILIES[name]()
    return randomize(model).eval(), call


def family(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in evaluation mode, and what it is called with."""
    model, call = _made(name)
    return copy.deepcopy(model), call


@torch.no_grad()
def outputs(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that it gives, of arguments in its dtype."""
    dtype = next(model.parameters()).dtype
    call = {name: t.to(dtype) if t.is_floating_point() else t for name, t in call.items()}
    return {name: value.clone() for name, value in named(model(**call))}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same but for rounding in float32."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=1e-4)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same bits."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def is_the_librarys(model: nn.Module) -> bool:
    """Whether no module's class is fastvit's, or one that was made from it."""
    classes = [base for module in model.modules() for base in type(module).__mro__]
    return not any(base.__module__.startswith("fastvit") for base in classes)
