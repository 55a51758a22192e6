"""accelerate, fold_normalize and restore in every order, of the whole model and of parts of it."""

import copy

import pytest
import torch
from accelerated import close, images, pair
from families import is_the_librarys

import fastvit
from fastvit.accelerate.registry import is_replaced

X = images(batch=2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCK_OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")


class Told:
    """What a model was told, as it should be: the mode of each part, None for the library's own."""

    def __init__(self):
        self.modes = dict.fromkeys(("", "patch_embed", "blocks.0", "blocks.1"))
        self.normalizes = False

    def accelerate(self, model, mode):
        fastvit.accelerate(model, mode=mode, strict=True)
        self.modes = dict.fromkeys(self.modes, mode)

    def restore(self, model, name=""):
        part = model.get_submodule(name)
        assert fastvit.restore(part) is part
        self.modes |= {part: None for part in self.modes if part.startswith(name)}
        self.normalizes &= bool(name)

    def normalize(self, model):
        if self.modes[""] is None:
            with pytest.raises(ValueError, match="accelerate it first"):
                fastvit.fold_normalize(model, MEAN, STD)
        else:
            fastvit.fold_normalize(model, MEAN, STD)
            self.normalizes = True

    def is_so(self, model, original):
        for name, mode in self.modes.items():
            part = model.get_submodule(name)
            assert is_replaced(part) == (mode is not None)
            assert ("_fastvit" in vars(part)) == (mode is not None)
            assert mode is None or part._fastvit.frozen == (mode == "inference")
        assert is_the_librarys(model) == (not any(self.modes.values()))
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        with torch.no_grad(), fastvit.use_backend(**dict.fromkeys(BLOCK_OPS, "cpp")):
            close(model(X), original((X - mean) / std if self.normalizes else X), factor=5)


STEPS = {
    "train": lambda told, model: told.accelerate(model, "train"),
    "inference": lambda told, model: told.accelerate(model, "inference"),
    "restore": Told.restore,
    "restore a block": lambda told, model: told.restore(model, "blocks.0"),
    "restore the embedding": lambda told, model: told.restore(model, "patch_embed"),
    "normalize": Told.normalize,
}


@pytest.mark.parametrize("first", STEPS)
def test_every_order(first):
    model, accelerated = pair()
    for second in STEPS:
        fast, told = copy.deepcopy(accelerated), Told()
        told.accelerate(fast, "train")
        STEPS[first](told, fast)
        STEPS[second](told, fast)
        told.is_so(fast, model)
        told.restore(fast)
        told.restore(fast)
        told.is_so(fast, model)
        with torch.no_grad():
            assert torch.equal(fast(X), model(X)), second


def test_parts_that_two_models_share():
    (model, fast), (other_model, other) = pair(), pair(num_classes=5)
    other.patch_embed, other.blocks[0] = fast.patch_embed, fast.blocks[0]
    other_model.patch_embed, other_model.blocks[0] = model.patch_embed, model.blocks[0]
    with torch.no_grad():
        outs = model(X), other_model(X)
        for change in (fastvit.restore, fastvit.accelerate):
            change(fast)
            assert is_replaced(other.blocks[0]) == is_replaced(fast.blocks[0])
            assert is_replaced(other)
            for each, out in zip((fast, other), outs, strict=True):
                close(each(X), out)
        fastvit.restore(fast)
        fastvit.restore(other)
        assert is_the_librarys(other)
        assert all(torch.equal(each(X), out) for each, out in zip((fast, other), outs, strict=True))
