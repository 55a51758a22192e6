"""The writers of weights there are, as people do it, whether torch is told of it or not: see writing.py."""

import copy
import pickle
import zlib
from collections.abc import Callable

import torch
from memory_writers import MEMORY, poked
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from writing import (
    Writer,
    Writes,
    delta,
    edited,
    every,
    linears,
    matrices,
    one_by_one,
    other_state,
    replaced,
    vectors,
)


def lora(model: nn.Module) -> Writes:
    """peft's merge_and_unload, and unmerge."""
    for sign in (1, -1):
        for name, p in matrices(model):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            b, a = (torch.randn(size, generator=generator) for size in ((p.shape[0], 2), (2, p.shape[1])))
            p.data += sign * 0.5 * p.detach().abs().mean() * (b @ a).to(p.dtype)
        yield model


def initialised(name: str, p: nn.Parameter) -> None:
    nn.init.trunc_normal_(p.data, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    p.data.add_(0.3 * torch.sign(p.data))


def of_other_memory(name: str, p: nn.Parameter) -> None:
    p.data = p.data + delta(name, p)


def flat_vector(model: nn.Module) -> Writes:
    for _ in range(2):
        values = [(p.detach() + delta(name, p)).flatten() for name, p in model.named_parameters()]
        nn.utils.vector_to_parameters(torch.cat(values), model.parameters())
        yield model


def torch_ema(model: nn.Module) -> Writes:
    """ExponentialMovingAverage: update, then store, copy_to, restore as average_parameters does."""
    shadows = [p.clone().detach() for p in model.parameters()]
    edited(model)
    for shadow, p in zip(shadows, model.parameters(), strict=True):
        shadow.sub_(0.1 * (shadow - p.detach()))
    stored = [p.clone() for p in model.parameters()]
    for shadow, p in zip(shadows, model.parameters(), strict=True):
        p.data.copy_(shadow.data)
    yield model
    for old, p in zip(stored, model.parameters(), strict=True):
        p.data.copy_(old.data)
    yield model


def averaged_model(model: nn.Module) -> Writes:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    yield averaged.module
    for _ in range(2):
        edited(model)
        averaged.update_parameters(model)
        yield averaged.module


def swapped(model: nn.Module) -> Writes:
    for _ in range(2):
        for name, p in model.named_parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() + delta(name, p)))
        yield model


def while_conversions_swap(change: Callable[[nn.Module], object]):
    def writer(model: nn.Module) -> Writes:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            change(model)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        yield model

    return writer


def stepped(optimizer: type, **options):
    def change(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.grad = delta(name, p).sign()
        optimizer(model.parameters(), lr=0.03, **options).step()
        model.zero_grad()

    return replaced(change)


def pruned(model: nn.Module) -> Writes:
    for module in linears(model):
        prune.l1_unstructured(module, "weight", 0.5)
    yield model
    for module in linears(model):
        prune.remove(module, "weight")
    yield model


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.25 * weight


def parametrized(model: nn.Module) -> Writes:
    for module in linears(model):
        parametrize.register_parametrization(module, "weight", Scaled())
    yield model
    for module in linears(model):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    yield model


def copied(copy_of: Callable[[nn.Module], nn.Module]):
    """A writer that writes a copy, then the model that was copied: neither follows the other."""

    def writer(model: nn.Module) -> Writes:
        other = copy_of(model)
        yield other
        edited(other)
        yield other
        yield model
        edited(model)
        yield other
        yield model

    return writer


def foreach(model: nn.Module) -> Writes:
    data = [p.data for p in model.parameters()]
    torch._foreach_mul_(data, 1.25)
    yield model
    torch._foreach_add_(data, [delta(name, p) for name, p in model.named_parameters()])
    yield model
    torch._foreach_copy_(data, [0.9 * p.detach() for p in model.parameters()])
    yield model


@torch.inference_mode()
def while_inferring(name: str, p: nn.Parameter) -> None:
    p.add_(delta(name, p))


@torch.no_grad()
def as_told(name: str, p: nn.Parameter) -> None:
    p.add_(delta(name, p))


@torch.no_grad()
def set_to(name: str, p: nn.Parameter) -> None:
    p.set_(p + delta(name, p))


def half_of(name: str, p: nn.Parameter) -> None:
    """Every other number alone: what pruning by hand does."""
    p.data.mul_(1 - 0.6 * (delta(name, p) > 0).to(p.dtype))


# Of each matrix most rows.
BROAD: dict[str, Writer] = {
    "in place": every(as_told),
    "set_": every(set_to),
    "LoRA merged": lora,
    "data, copied": every(lambda name, p: p.data.copy_(p.data + delta(name, p))),
    "data, multiplied": every(lambda name, p: p.data.mul_(1.25)),
    "data, lerp": every(lambda name, p: p.data.lerp_(p.data + delta(name, p), 0.5)),
    "data, initialised": every(initialised),
    "data, half of it": every(half_of),
    "data of vectors alone": every(lambda name, p: p.data.add_(delta(name, p)), vectors),
    "data, other memory": every(of_other_memory),
    "inference mode": every(while_inferring),
    "flat vector": flat_vector,
    "torch_ema": torch_ema,
    "AveragedModel": averaged_model,
    **MEMORY,
    "swap_tensors": swapped,
    "load_state_dict": replaced(lambda m: m.load_state_dict(other_state(m))),
    "load_state_dict, assigned": replaced(lambda m: m.load_state_dict(other_state(m), assign=True)),
    "load_state_dict, swapped": while_conversions_swap(lambda m: m.load_state_dict(other_state(m))),
    "fused SGD": stepped(torch.optim.SGD, fused=True),
    "fused AdamW": stepped(torch.optim.AdamW, fused=True),
    "foreach Adam": stepped(torch.optim.Adam, foreach=True),
    "SGD in a loop": stepped(torch.optim.SGD, foreach=False),
    "foreach": foreach,
    "half and back": replaced(lambda m: (edited(m), m.half().float())),
    "to float64": replaced(lambda m: (edited(m), m.to(torch.float64))),
    "to float64, swapped": while_conversions_swap(lambda m: (edited(m), m.double())),
    "pruned": pruned,
    "parametrized": parametrized,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda m: pickle.loads(pickle.dumps(m))),
}
# Of each matrix a part, of which torch tells nothing: followed where weights are not said to be frozen.
NARROW: dict[str, Writer] = {
    "one row": one_by_one(lambda p, amount: p.data[len(p) // 2].add_(amount)),
    "one column": one_by_one(lambda p, amount: p.data[:, p.shape[1] // 3].add_(amount)),
    "the first element": one_by_one(lambda p, amount: p.data[0, 0].add_(amount)),
    "the last element": one_by_one(lambda p, amount: p.data[-1, -1].add_(amount)),
    "an element by its address": one_by_one(poked),
    "an element of a vector": every(
        lambda name, p: p.data[len(p) // 2].add_(p.detach().abs().mean()), vectors
    ),
}
WRITERS = BROAD | NARROW
