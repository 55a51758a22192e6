"""A graph for CPUs: the ops that a model comes down to, as straight-line code that torch.fx writes.

Of a small batch's time on a CPU much goes by before any op is called: modules look at themselves and at each
other, tables are asked, kept weights are found. All that has one answer until something changes.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .graph_calls import Forward, Place, Uncapturable
from .graph_trial import on_trial
from .ops.registration import kernels_of


class Cpu:
    """A CPU as graphs need it: nothing is shared, and nothing waits."""

    def __init__(self, device: torch.device) -> None:
        pass

    def renew(self) -> None:
        pass

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    aside = turn

    def on_trial(self, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
        return on_trial("cpu", forward, inputs)

    def capture(
        self, forward: Forward, places: Sequence[Place], inputs: list[Tensor]
    ) -> tuple["_Tape", list[Tensor], Any]:
        with _Recorder(inputs) as recorder:
            out = forward(inputs)
        code = recorder.code(_tensors(out))
        out = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, out)
        tape = _Tape(code, inputs, _tensors(out))
        tape.compare(forward)
        return tape, inputs, out

    @staticmethod
    def is_capturing() -> bool:
        return False  # the recorder is a dispatch mode, for which runners give way


class _Tape:
    def __init__(self, code: Callable[..., Sequence[Tensor]], inputs: list[Tensor], outputs: list[Tensor]):
        self._code, self._inputs, self._outputs = code, inputs, outputs

    def replay(self) -> None:
        # The casts of autocast are among the ops.
        with torch.inference_mode(), torch._C._DisableAutocast():
            for place, new in zip(self._outputs, self._code(*self._inputs), strict=True):
                place.copy_(new)

    def compare(self, forward: Forward) -> None:
        """See that it gives the forward's bits for other numbers too.

        Raises:
            Uncapturable: if it does not.
        """
        others = [place.flip(tuple(range(place.ndim))) for place in self._inputs]
        if others[0].is_floating_point():
            others[0].neg_().add_(0.5)
        for place, other in zip(self._inputs, others, strict=True):
            place.copy_(other)
        self.replay()
        if not all(map(_is_same, self._outputs, _tensors(forward(others)))):
            raise Uncapturable("a replay gives other numbers: it draws some, or computes outside of torch")


class _Recorder(TorchDispatchMode):
    """Writes down every op of a run; of fastvit's own those that they call, with the weights they keep."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self._graph, self._constants = fx.Graph(), {}
        self._known: dict[int, tuple[weakref.ref, fx.Node]] = {}
        for i, tensor in enumerate(inputs):
            self._note(tensor, self._graph.placeholder(f"input_{i}"))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (kernels := kernels_of(function)) is not None:
            with self:
                return kernels(*args, **kwargs)
        node = self._graph.call_function(function, *tree_map(self._read, (args, kwargs)))
        out = function(*args, **kwargs)
        self._note(out, node)
        return out

    def code(self, outputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """What computes them from the inputs."""
        self._graph.output(list(map(self._read, outputs)))
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._constants, self._graph).forward

    def _note(self, made: Any, node: fx.Node) -> None:
        if isinstance(made, Tensor):
            self._known[id(made)] = weakref.ref(made), node
        elif isinstance(made, (tuple, list)):
            for i, each in enumerate(made):
                if isinstance(each, Tensor):
                    self._note(each, self._graph.call_function(getitem, (node, i)))

    def _read(self, value: Any) -> Any:
        """A tensor's node: of what made it, or of the memory of one that was there before."""
        if not isinstance(value, Tensor):
            return value
        ref, node = self._known.get(id(value), (None, None))
        if ref is None or ref() is not value:
            name = f"constant_{len(self._constants)}"
            node = self._graph.get_attr(name)
            self._constants[name] = value.detach()
            self._known[id(value)] = weakref.ref(value), node
        return node


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
