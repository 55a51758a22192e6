"""Ops in torch's dispatcher: one call to a compiler, an exporter, a tracer."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import Library

from ..call_facts import exporting, needs_gradient
from ..extension import load_ops

NAMESPACE = __name__.partition(".")[0]
_library = Library(NAMESPACE, "FRAGMENT")
_kernels: dict[Any, Callable] = {}
# What an op takes, beside which there may be tensors of other types.
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), torch.dtype, bool, int, float, str, list, tuple)
)


def register(
    schema: str,
    kernels: Callable,
    shapes: Callable,
    autograd: Callable | None = None,
    compiled: bool = True,
) -> Any:
    """Define ``fastvit::<schema>``, and return it.

    Args:
        schema: in torch's own language.
        kernels: runs it.
        shapes: gives tensors of the same shapes, dtypes and strides, without data.
        autograd: runs it and records its gradients.
        compiled: the kernels are those of a compiled library.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    entry = _loading if compiled else (lambda function: function)
    _library.impl(name, entry(kernels), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    if autograd is not None:
        _library.impl(name, entry(autograd), "Autograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _kernels[op] = kernels
    return op


def _loading(function: Callable) -> Callable:
    """An entry for a program that was saved: no one may have asked here whether the kernels can run."""

    @wraps(function)
    def loaded(*args: Any) -> Any:
        load_ops(next(value.device.type for value in args if isinstance(value, Tensor)))
        return function(*args)

    return loaded


def records_gradients(*values: Any) -> bool:
    """Whether who calls the op is to record gradients for one of the values.

    Not while a program is exported, in which the op itself is to stand: that records its own where it runs.
    """
    return needs_gradient(*values) and not exporting()


def call(op: Any, *args: Any) -> Any:
    """The op, whose gradients the caller sees to: in eager mode past its entry for them, which is Python.

    And past the dispatcher too, where nobody is watching: it takes as long as some kernels do.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # so or so exporting
        return op(*args)
    run = op if is_watched(args) else _kernels[op]
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def kernels_of(op: Any) -> Callable | None:
    """What runs it, of an op that is registered here."""
    return _kernels.get(op)


def is_watched(args: tuple) -> bool:
    """Whether a mode or a tensor of another type is to see the op itself."""
    return bool(torch._C._len_torch_dispatch_stack()) or not _PLAIN.issuperset(map(type, args))


def below_autograd(op: Any, *args: Any) -> Any:
    """The op from its own entry for gradients, where none is needed."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def once_differentiable(backward: Callable) -> Callable:
    """A Function's ``backward`` whose gradients cannot be differentiated again, and say so if they are.

    torch's own decorator lets them pass for constants where the gradient that came in is one, as that of
    ``loss.sum()`` is: a penalty on such gradients would silently have none.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: torch.Tensor) -> Any:
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not recorded:
            return gradients
        return _Once.apply(torch.ones((), requires_grad=True), *gradients)

    return once


class _Once(Function):
    """The gradients themselves, of which a second derivative is an error."""

    @staticmethod
    def forward(ctx, anchor, *gradients):
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fastvit's kernels give first derivatives only (they are once_differentiable): "
            'for second ones run the forward pass under fastvit.use_backend("reference")'
        )
