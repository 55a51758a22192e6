"""Runners on a CPU, and what they are to give."""

import torch
from torch.utils._pytree import tree_leaves

from fastvit import graphed


def replays(runner):
    return sum(bucket.replays for bucket in runner._buckets.values())


def assert_same(runner, *args, **kwargs):
    """The model's bits, by a replay."""
    before = replays(runner)
    found, expected = runner(*args, **kwargs), runner.model(*args, **kwargs)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert replays(runner) > before, runner.explain()
    return found


def runner_of(model, *args, **kwargs):
    return graphed(model.eval(), *args, **kwargs)
