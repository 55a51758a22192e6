"""A graph for CPUs: the ops that a model comes down to, as straight-line code that torch.fx writes.

Of a small batch's time on a CPU much goes by before any op is called: modules look at themselves and at each
other, tables are asked, kept weights are found. All that has one answer until something changes.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .graph_calls import Forward, Place, Uncapturable, copies
from .graph_trial import Methods, Ops, tensors_in
from .ops.registration import kernels_of


class Cpu:
    """A CPU as graphs need it: nothing is shared, and nothing waits."""

    is_asynchronous = False

    def __init__(self, device: torch.device) -> None:
        pass

    def renew(self) -> None:
        pass

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def on_trial(self, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
        # By itself: beside such a mode torch's own modules take another path than without.
        with Methods() as methods:
            forward(copies(inputs))
        methods.raise_if_refused()
        return []  # the tape holds what it reads

    def capture(
        self, forward: Forward, places: Sequence[Place], inputs: list[Tensor]
    ) -> tuple["_Tape", list[Tensor], Any]:
        given, drawn = copies(inputs), torch.get_rng_state()
        with Recorder(given) as recorder:
            out = forward(given)
        if not torch.equal(torch.get_rng_state(), drawn):
            raise Uncapturable("it draws random numbers")
        program = recorder.program(tensors_in(out))
        out = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, out)
        tape = _Tape(program, inputs, tensors_in(out))
        tape.compare(forward)
        return tape, inputs, out

    @staticmethod
    def is_capturing() -> bool:
        return False  # the recorder is a dispatch mode, for which runners give way


class Program(NamedTuple):
    """What computes the outputs: ``code(None, *inputs, *constants)``."""

    code: Callable[..., Sequence[Tensor]]
    constants: tuple[Tensor, ...]

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.code(None, *inputs, *self.constants)


class _Tape:
    def __init__(self, program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._program, self._inputs, self._outputs = program, inputs, outputs

    def replay(self) -> None:
        # The casts of autocast are among the ops.
        with torch.inference_mode(), torch._C._DisableAutocast():
            # Not the places themselves: an op may give its input another shape.
            outputs = self._program(*map(Tensor.detach, self._inputs))
            for place, new in zip(self._outputs, outputs, strict=True):
                place.copy_(new)

    def compare(self, forward: Forward) -> None:
        """See that it gives the forward's bits for other numbers too.

        Raises:
            Uncapturable: if it does not.
        """
        others = list(map(_other_numbers, self._inputs))
        for place, other in zip(self._inputs, others, strict=True):
            place.copy_(other)
        self.replay()
        if not all(map(_has_same_bits, self._outputs, tensors_in(forward(others)))):
            raise Uncapturable("a replay gives other numbers, as if it computed outside of torch")


class Recorder(Ops):
    """Writes down every op of a run; of fastvit's own those that they call, with the weights they keep."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__("cpu")
        self._graph = fx.Graph()
        self._constants: dict[fx.Node, Tensor] = {}
        self._known: dict[int, tuple[weakref.ref, fx.Node]] = {}
        for i, tensor in enumerate(inputs):
            self._note(tensor, self._graph.placeholder(f"input_{i}"))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (kernels := kernels_of(function)) is not None:
            with self:
                return kernels(*args, **kwargs)
        if str(function) == "aten.lift_fresh.default":  # torch.tensor(...): a new one at every call
            fresh = self._constant(args[0].clone())
            node = self._graph.call_function(torch.ops.aten.clone.default, (fresh,))
        else:
            node = self._graph.call_function(function, *tree_map(self._read, (args, kwargs)))
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self._note(out, node)
        return out

    def program(self, outputs: list[Tensor]) -> Program:
        """What computes them from the inputs."""
        self.raise_if_refused()
        self._graph.output(list(map(self._read, outputs)))
        self._graph.eliminate_dead_code()
        for node in [node for node in self._constants if not node.users]:
            self._graph.erase_node(node)
            del self._constants[node]
        # Not as a GraphModule: torch.fx keeps the source of each for good.
        written = self._graph.python_code("self")
        exec(compile(written.src, "<a graph of fastvit>", "exec"), written.globals)
        return Program(written.globals["forward"], tuple(self._constants.values()))

    def _check(self, function: Any, args: tuple, given: list[Tensor], out: Any) -> None:
        super()._check(function, args, given, out)
        if not all(isinstance(leaf, (Tensor, type(None))) for leaf in tree_leaves(out)):
            self.refuse(f"{function} tells Python something of a tensor's numbers")

    def _note(self, made: Any, node: fx.Node) -> None:
        if isinstance(made, Tensor):
            self._known[id(made)] = weakref.ref(made), node
        elif isinstance(made, (tuple, list)):
            for i, each in enumerate(made):
                self._note(each, self._graph.call_function(getitem, (node, i)))

    def _read(self, value: Any) -> Any:
        """A tensor's node: of what made it, or of the memory of one that was there before."""
        if not isinstance(value, Tensor):
            return value
        ref, node = self._known.get(id(value), (None, None))
        if ref is None or ref() is not value:
            node = self._constant(value.detach())
            self._known[id(value)] = weakref.ref(value), node
        return node

    def _constant(self, tensor: Tensor) -> fx.Node:
        node = self._graph.placeholder(f"constant_{len(self._constants)}")
        self._constants[node] = tensor
        return node


def _other_numbers(tensor: Tensor) -> Tensor:
    """Of the same kind: floats of another sign and size, integers that the tensor holds or one less."""
    other = tensor.flip(tuple(range(tensor.ndim)))
    if tensor.dtype == torch.bool:
        return ~other
    if tensor.is_floating_point() or tensor.is_complex():
        return other.mul_(-0.75).add_(0.5)
    return other if not torch.equal(other, tensor) else other - (other > 0).to(other.dtype)


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN too."""
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
