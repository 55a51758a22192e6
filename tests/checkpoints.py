"""A small model, its file in either format, and what a refusal must look like."""

import pytest
import safetensors.torch
import torch
from torch import nn

from fastvit.checkpoint import load_checkpoint, read_state_dict
from fastvit.errors import CheckpointError

FORMATS = ("safetensors", "pt")
in_both_formats = pytest.mark.parametrize("path", FORMATS, indirect=True)


class Tiny(nn.Module):
    """A 2x2 grid of patches, one class token, a head of three: the names that the hints know."""

    def __init__(self, grid=2, classes=3, device=None):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4, device=device))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid * grid, 4, device=device))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 14, stride=14, device=device)})
        self.norm = nn.BatchNorm1d(4, device=device)
        self.head = nn.Linear(4, classes, device=device) if classes else nn.Identity()


def save(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def unchanged(model):
    """A check, to be called later, that no tensor of the model was touched since now."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return lambda: all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def refusal(path, model=None):
    """The message with which the file is refused: it names file and size, and leaves the model alone."""
    intact = unchanged(model) if model else lambda: True
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model, path) if model else read_state_dict(path)
    message = str(raised.value)
    assert str(path) in message
    assert f"({path.stat().st_size} bytes)" in message
    assert intact()
    return message
