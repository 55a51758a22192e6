"""Whether a kernel would serve an op's call: asked without computing, and without a module that is called."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class Served(Exception):
    """A kernel would serve the call that is asked about."""


class _Thread(threading.local):
    asking = False


_thread = _Thread()


def is_asking() -> bool:
    """Inside of `would_serve`: an op computes nothing, and answers with a tensor of its result's shape."""
    return not torch.compiler.is_compiling() and _thread.asking


def would_serve(calls: Callable[[], Any]) -> bool:
    """Whether a kernel would serve one of the ops that ``calls`` calls; what it calls beside ops runs."""
    _thread.asking = True
    try:
        calls()
    except Served:
        return True
    finally:
        _thread.asking = False
    return False
