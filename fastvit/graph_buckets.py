"""One captured kind of call: inputs and outputs in fixed places, and the graph between."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .derived import Reading
from .graph_calls import Device, Forward, Place, Uncapturable


class Bucket:
    """A captured call: inputs and outputs in fixed places, the graph between, and all that it reads.

    Raises:
        Uncapturable: if a run that is looked at, or the capture, fails; the call has been run before.
    """

    def __init__(
        self, device: Device, forward: Forward, places: Sequence[Place], inputs: list[Tensor]
    ) -> None:
        self.reading, self.replays = Reading(), 0
        try:
            with self.reading:
                self._outside = device.on_trial(forward, inputs)
                self._graph, self._inputs, out = device.capture(forward, places, inputs)
        except Exception as error:
            raise Uncapturable(_in_one_line(error)) from error
        self._leaves, self._spec = tree_flatten(out)
        for leaf in self._leaves:
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise Uncapturable(f"it returns a {type(leaf).__name__}, which is no pytree of tensors")
        self._size = places[0].shape[0]

    def run(self, tensors: Sequence[Tensor], batch: int) -> None:
        """Copy the call's tensors in, above zeros for the rows beyond the batch, and replay."""
        for place, tensor in zip(self._inputs, tensors, strict=True):
            if place.shape == tensor.shape:
                place.copy_(tensor)
            else:
                place[:batch].copy_(tensor)
                place[batch:].zero_()
        self._graph.replay()
        self.replays += 1

    def results(self, batch: int, clone: bool) -> Any:
        """What the call returned, of the batch's rows; in the graph's own memory where not cloned."""

        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if batch < self._size and leaf.ndim and leaf.shape[0] == self._size:
                leaf = leaf[:batch]
            return leaf.clone() if clone else leaf

        return tree_unflatten(map(given, self._leaves), self._spec)


def _in_one_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, Uncapturable) else f"{type(error).__name__}: {text[:200]}"
