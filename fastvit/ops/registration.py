"""Ops in torch's dispatcher: one call to a compiler, an exporter, a tracer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

NAMESPACE = __name__.partition(".")[0]
_library = Library(NAMESPACE, "FRAGMENT")


def register(schema: str, kernels: Callable, shapes: Callable, autograd: Callable | None = None) -> Any:
    """Define ``fastvit::<schema>``, and return it.

    Args:
        schema: in torch's own language.
        kernels: runs it.
        shapes: gives tensors of the same shapes, dtypes and strides, without data.
        autograd: runs it and records its gradients.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernels, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def call(op: Any, *args: Any) -> Any:
    """The op, whose gradients the caller sees to: in eager mode past its entry for them, which is Python."""
    return op(*args) if torch.compiler.is_compiling() else below_autograd(op, *args)


def below_autograd(op: Any, *args: Any) -> Any:
    """The op from its own entry for gradients, where none is needed."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
