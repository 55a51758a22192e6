"""What `use_backend` has entered, and which of it holds for a call, in other threads and in checkpoints.

A checkpoint computes again in backward what a ``with`` block around the forward may have left long ago. What
holds there is what held in the forward, and what is entered again inside of the checkpointed function.
torch.utils.checkpoint has no place for that in checkpoints that are a library's own. But each has one object
that lives from its forward to its backward, which both can see from the inside, and that keeps it.
"""

import sys
from threading import get_ident
from typing import Any

import torch
from torch.utils import checkpoint

# A plain list, innermost last: torch.compile traces through it, which a ContextVar would stop. It is changed
# by `append` and `remove` alone, each of which other threads see done or not begun.
stack: list["Frame"] = []


class Frame:
    """{op: backend}, for every thread or for one, entered inside of some checkpointed regions."""

    def __init__(self, requested: dict[str, str], everywhere: bool) -> None:
        self.requested, self.asked = requested, tuple(requested.items())
        traced = torch.compiler.is_compiling()
        self.thread = None if everywhere or traced else get_ident()
        self.regions = () if traced else tuple(region for region, _ in _regions())


def holding() -> list[Frame]:
    """The frames that hold for this call, innermost last."""
    if torch.compiler.is_compiling():
        return [frame for frame in stack if frame.thread is None]
    if not stack and torch._C._current_graph_task_id() == -1:
        return []
    thread = get_ident()
    held = [frame for frame in list(stack) if frame.thread in (None, thread)]
    if torch.is_inference_mode_enabled() and torch._C._current_graph_task_id() == -1:
        return held  # nothing is saved for a backward, which would compute it again
    regions = _regions()
    for region, again in regions:
        if again:
            held = [*getattr(region, _ATTRIBUTE, ()), *(frame for frame in held if region in frame.regions)]
    for region, again in regions:
        if not again and not hasattr(region, _ATTRIBUTE):
            setattr(region, _ATTRIBUTE, [frame for frame in held if region not in frame.regions])
    return held


def asked() -> tuple:
    """What those ask for, as a part of a key."""
    return tuple([frame.asked for frame in holding()])


_ATTRIBUTE = "_fastvit_frames"
_FILE = checkpoint.__file__
# Functions of torch.utils.checkpoint that are running, the variable of each that is the region's object, and
# whether the region is computed again.
_RUNNING = {"forward": ("ctx", False), "backward": ("ctx", True), "unpack_hook": ("frame", True)}


def _regions() -> list[tuple[Any, bool]]:
    """The checkpointed regions that are being computed, outermost first, and whether that is done again."""
    found = []
    caller = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_filename == _FILE:
            variables = caller.f_locals
            name, again = _RUNNING.get(caller.f_code.co_name, ("", False))
            region = variables.get(name)
            if "gen" in variables:  # which waits while the function runs for the first time
                region = variables["gen"].gi_frame.f_locals.get("new_frame")
            if region is not None:
                found.append((region, again))
        caller = caller.f_back
    return found[::-1]
