"""A small training loop that can be stopped anywhere: its state is one file, which is always whole."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.errors import CheckpointError, FastvitError


class TrainingError(FastvitError):
    """Training cannot go on; the message says what is kept."""


@dataclass
class Trainer:
    """AdamW with warm-up and cosine decay on batches that depend on the seed and the step alone.

    Args:
        model: gives logits [B, classes].
        images, labels: the training set, [M, C, H, W] and [M].
        file: where the state is kept; a run that finds one goes on from there.
        steps: of the whole run.
        augment: changes a batch by what it draws from the generator.
        described: what must be the same for a state to be this run's, by name.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    file: Path
    steps: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    save_every: int = 50
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, _: images
    described: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.learning_rate, weight_decay=0.05)
        if self.file.exists():
            self._load()

    def run(self, until: int | None = None, on_step: Callable[[], object] = lambda: None) -> list[float]:
        """Train to the end, or to step ``until``; returns the loss of every step so far.

        Raises:
            TrainingError: if a loss is not finite, or the state cannot be written; the last one stays whole.
        """
        self.model.train()
        last = self.steps if until is None else until
        while len(self.losses) < last:
            self.losses.append(self._step(len(self.losses)))
            if len(self.losses) % self.save_every == 0 or len(self.losses) == last:
                self._save()
            on_step()
        return self.losses

    def _step(self, number: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(number)
        images, labels = self._batch(number)
        loss = F.cross_entropy(self.model(images), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {number}: lower the rate; {self._kept()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (0.05 * self.steps + 1))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        per_epoch = len(self.images) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed + epoch))
        chosen = order[place * self.batch_size :][: self.batch_size]
        drawn = torch.Generator().manual_seed(self.seed + step)
        return self.augment(self.images[chosen], drawn), self.labels[chosen]

    def _save(self) -> None:
        """In the place of the last state only when it is on the disk, whole."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.file.with_name(f"{self.file.name}.partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as out:
                torch.save(state | {"losses": self.losses, "described": self._identity()}, out)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(self.file)
        except (OSError, RuntimeError) as error:  # torch's writer has its own for a full disk
            partial.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{self.file} cannot be written: {reason}; {self._kept()}") from error

    def _kept(self) -> str:
        if not self.file.exists():
            return "no state was kept yet"
        steps = len(torch.load(self.file, weights_only=True)["losses"])
        return f"the state of step {steps} is whole, in {self.file}"

    def _load(self) -> None:
        try:
            state = torch.load(self.file, weights_only=True)
            theirs, losses = state["described"], list(state["losses"])
        except Exception as error:  # each kind of damage has its own
            raise CheckpointError(f"{self.file} holds no state of a training: {error!s:.80}") from error
        differing = [name for name, value in self._identity().items() if theirs.get(name) != value]
        if differing:
            name = differing[0]
            found, wanted = theirs.get(name), self._identity()[name]
            raise CheckpointError(
                f"{self.file} is of another run: its {name} is {found}, this one's {wanted}; "
                "name another folder, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = losses

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        size = sum(p.numel() for p in self.model.parameters())
        own = {"parameters": f"{len(shapes)} of {size} numbers", "steps": self.steps, "seed": self.seed}
        return own | {"batch size": self.batch_size, "learning rate": self.learning_rate} | self.described
