"""A layer whose weights may be packed and folded, and everything that can change them."""

import copy
import io
import pickle
from functools import partial

import op_cases
import torch
from op_checks import within_contract
from torch import nn

from fastvit import ops, refresh

ACTIVE = {"x", "residual", "sample_scale"}
# More rows than the few that are no reason to pack.
SIZES = {"batch": 3, "tokens": 11, "width": 40}


class Layer(nn.Module):
    """An op with parameters of its own, LayerScale and a gate among them, of other numbers for each seed.

    Frozen, it keeps copies of them.
    """

    def __init__(self, op, seed=0, frozen=True):
        super().__init__()
        self.op, self.fixed, self.frozen = op, {}, frozen
        torch.manual_seed(seed)
        for name, value in op_cases.build(op, dtype=torch.float32, **op_cases.FULL[op], **SIZES).items():
            if isinstance(value, torch.Tensor) and name not in ACTIVE:
                setattr(self, name, nn.Parameter(value + torch.randn_like(value) / 4))
            else:
                self.fixed[name] = value

    def call(self):
        dtype = next(self.parameters()).dtype
        return op_cases.converted(self.fixed, lambda t: t.to(dtype)) | dict(self.named_parameters())

    def function(self, **call):
        return getattr(ops, self.op)(**call, frozen=self.frozen)

    def forward(self):
        return self.function(**self.call())

    def judged(self):
        """What it computes is what its parameters are now, by the contract."""
        within_contract(self.op, self.call(), self.function)
        with torch.no_grad():
            return self()


def stepped(optimizer, **options):
    """One step of the optimizer on every parameter, with made-up gradients."""

    def step(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), lr=0.1, **options).step()

    return step


def through(copied):
    """Through a copy or a file: the same numbers in other tensors, which then change."""

    def change(model):
        loaded = copied(model)
        assert all(map(torch.equal, model.parameters(), loaded.parameters()))
        edited(loaded)
        return loaded

    return change


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def _loaded(model, **how):
    model.load_state_dict(Layer(model.op, seed=1).state_dict(), **how)


def edited(model, factor=1.5):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def _edited_as_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def _refreshed(model):
    for parameter in model.parameters():
        parameter.data.view(-1)[1:2].add_(1)
    if model.frozen:
        refresh(model)


def _edited_as_numpy(model):
    for parameter in model.parameters():
        parameter.detach().numpy().__imul__(1.5)


CHANGES = {
    "fused AdamW": stepped(torch.optim.AdamW, fused=True),
    "fused SGD": stepped(torch.optim.SGD, fused=True),
    "Adam": stepped(torch.optim.Adam, foreach=False),
    "in place": edited,
    "through data": _edited_as_data,
    "one element through data, and refresh": _refreshed,
    "through NumPy": _edited_as_numpy,
    "load_state_dict": _loaded,
    "load_state_dict, assigned": partial(_loaded, assign=True),
    "to float64": lambda m: m.to(torch.float64),
    "bfloat16": nn.Module.bfloat16,
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "half and back": lambda m: m.half().float(),
    "deepcopy": through(copy.deepcopy),
    "pickle": through(lambda m: pickle.loads(pickle.dumps(m))),
    "torch.save": through(_saved),
}
