"""verify on accelerated models: by the original, before and after, of any arguments and outputs."""

import pytest
import torch
from accelerated import images, pair
from native_calls import needs_library
from torch import nn

import fastvit
from fastvit import ParityError, ops

X = images(batch=8)


def test_before_accelerate_and_after_the_rows_are_the_same():
    model, fast = pair()
    before, after = fastvit.verify(model, X), fastvit.verify(fast, X)
    names = [row.name for row in after.rows]
    assert names == [row.name for row in before.rows] == ["embed", "blocks.0", "blocks.1", "output", "top-1"]
    assert before.ok
    assert after.ok


def test_the_judge_is_the_original_and_not_ours(monkeypatch):
    """A backend is named, as a block of this size otherwise runs its original forward, which has no fault."""
    _, fast = pair()
    original = ops.linear_residual
    monkeypatch.setattr(ops, "linear_residual", lambda *args, **how: original(*args, **how) * (1 + 1e-4))
    with fastvit.use_backend("reference"):
        report = fastvit.verify(fast, X)
    assert next(row.name for row in report.rows if not row.ok) == "blocks.0"
    with pytest.raises(ParityError, match=r"blocks\.0"):
        report.raise_if_failed()


def test_the_model_stays_accelerated():
    _, fast = pair()
    types = [type(module) for module in fast.modules()]
    fastvit.verify(fast, X, backward=True)
    assert [type(module) for module in fast.modules()] == types


def test_arguments_by_name():
    _, fast = pair()
    mask = torch.rand(17, 17) > 0.3
    report = fastvit.verify(fast, {"x": X, "attn_mask": mask.fill_diagonal_(True)})
    assert report.ok
    with pytest.raises(TypeError, match=r"verify needs floating images"):
        fastvit.verify(fast, {"x": X.to(torch.uint8)})


class Two(nn.Module):
    """Two towers, whose outputs are a mapping with a list in it."""

    def __init__(self):
        super().__init__()
        self.left, self.right = pair()[1], pair("eva")[1]

    def forward(self, x):
        return {"logits": self.left(x), "others": [self.right(x), "a word", x.argmax()]}


def test_outputs_and_blocks_of_nested_models():
    report = fastvit.verify(Two().eval(), X, backward=True)
    report.raise_if_failed()
    names = [row.name for row in report.rows]
    assert {"left.blocks.0", "right.blocks.1", "output.logits", "output.others.0", "top-1"} <= set(names)


@needs_library()
def test_copies_of_frozen_weights_are_compared_in_full():
    _, fast = pair(mode="inference")
    with fastvit.use_backend("cpp"):
        report = fastvit.verify(fast, X)
        assert report.ok
        assert report.rows[-1].name == "copies"
        fast.blocks[0].mlp.fc1.weight.data[0, 1] *= 1 + 1e-6  # less than a verdict on outputs would see
        report = fastvit.verify(fast, X)
        assert [row.name for row in report.rows if not row.ok] == ["copies"]
        assert "1 of " in report.rows[-1].reason
        assert fastvit.verify(fast, X).ok  # they are anew
