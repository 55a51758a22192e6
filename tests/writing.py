"""How weights are written: every parameter, one after another, by other tensors on their memory, all at once.

A writer takes a model and is a generator: it yields the model to go on with as often as there is something to
compare, and what it yields must then compute what the untouched model yields after the same writes. What is
written follows from the parameters' names and values, so that two models with the same weights stay so.
"""

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Writes = Iterator[nn.Module]
Writer = Callable[[nn.Module], Writes]


def delta(name: str, p: Tensor) -> Tensor:
    """A change of a third of what the parameter holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(p.shape, generator=generator).to(p.dtype)
    return 0.3 * p.detach().abs().mean() * noise


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of products: those that somebody may want to pack."""
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "emb" not in name]


def vectors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Norms, biases and LayerScale, and no matrix."""
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 1]


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def every(write: Callable[[str, nn.Parameter], object], which=nn.Module.named_parameters):
    """A writer that writes each parameter, twice."""

    def writer(model: nn.Module) -> Writes:
        for _ in range(2):
            for name, p in which(model):
                write(name, p)
            yield model

    return writer


def one_by_one(add: Callable[[Tensor, float], object]) -> Writer:
    """A writer that adds to a part of one matrix, takes it back, and goes on to the next."""

    def writer(model: nn.Module) -> Writes:
        for _, p in matrices(model):
            amount = 20 * float(p.detach().abs().mean())
            add(p, amount)
            yield model
            add(p, -amount)

    return writer


def through(view: Callable[[nn.Parameter], Tensor]):
    """A writer through other tensors on the same memory, which were taken before the model ran."""

    def writer(model: nn.Module) -> Writes:
        views = [(view(p), delta(name, p)) for name, p in model.named_parameters()]
        yield model
        for _ in range(2):
            for tensor, change in views:
                tensor += change.numpy() if not isinstance(tensor, Tensor) else change
            yield model

    return writer


def replaced(change: Callable[[nn.Module], object]):
    """A writer that writes all of a model at once, and again."""

    def writer(model: nn.Module) -> Writes:
        for _ in range(2):
            change(model)
            yield model

    return writer


def edited(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.data.add_(delta(name, p))


def other_state(model: nn.Module) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return {n: t + delta(n, t) if n in own else t.clone() for n, t in model.state_dict().items()}
