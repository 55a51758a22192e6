"""Checkpoints: read without executing anything in the file, loaded into a model whole or not at all."""

import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .errors import CheckpointError
from .key_report import KeyReport, compare

__all__ = ["KeyReport", "compare", "load_checkpoint", "load_state", "read_state_dict"]

WRAPPERS = ("state_dict", "model", "model_state_dict")
AVERAGES = ("state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a safetensors or torch.save file, on the CPU, in the file's own dtypes.

    One usual wrapper ("state_dict", "model", "model_state_dict") and a prefix common to all keys ("module.",
    "_orig_mod.") are taken off. Averaged weights ("state_dict_ema", "model_ema") are never chosen silently:
    beside the plain ones they are named in a warning, alone they are an error.

    Raises:
        CheckpointError: the file is absent, damaged, refused, or holds something other than dense tensors.
            The message names the file and its size.

    Sources: safetensors for one format, `torch.load(weights_only=True)` for the other. Nothing falls back
    to plain unpickling, so a hostile file is refused unexecuted.
    """
    path = Path(path)
    where = _describe(path)
    try:
        return _clean(_unwrap(_read(path), where))
    except Exception as error:  # damaged files make the two parsers raise nearly every type there is
        raise CheckpointError(f"{where} {_reason(error)}") from None


def load_checkpoint(model: nn.Module, path: str | PathLike[str], strict: bool = True) -> KeyReport:
    """Copies a checkpoint into `model`, in the model's dtypes and through its own `load_state_dict`.

    With `strict` every key must fit, or the model is left as it was. Without it, what fits is copied, and
    the report that comes back names the rest.

    Raises:
        CheckpointError: the file cannot be read, does not fit, or the model is on the meta device.
    """
    return load_state(model, read_state_dict(path), path, strict)


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | PathLike[str], strict: bool = True
) -> KeyReport:
    """`load_checkpoint` for tensors that `read_state_dict(path)` has returned already."""
    where = _describe(Path(path))
    target = model.state_dict()
    if bare := [key for key, tensor in target.items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise CheckpointError(
            f"{where} finds no memory in the model: {bare[0]} is on the meta device; "
            "call model.to_empty(device=...) first"
        )
    report = compare(target, state)
    if strict and not report.ok:
        raise CheckpointError(f"{where} does not fit {type(model).__name__}:\n{report}")
    unfit = {*report.unexpected, *(key for key, _, _ in report.wrong_shape)}
    fits = OrderedDict((key, tensor) for key, tensor in state.items() if key not in unfit)
    fits._metadata = getattr(state, "_metadata", {})
    model.load_state_dict(fits, strict=strict)
    return report


def _describe(path: Path) -> str:
    try:
        info = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    where = f"{path} ({info.st_size} bytes)"
    if not stat.S_ISREG(info.st_mode):
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "no regular file"
        raise CheckpointError(f"{where} is {kind}, not a checkpoint")
    if info.st_size == 0:
        raise CheckpointError(f"{where} is empty")
    return where


def _read(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(9)
        zipped = head.startswith(b"PK\x03\x04")
        if not zipped and (head[8:] == b"{" or path.suffix == ".safetensors"):
            return safetensors.torch.load_file(path)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(
                    f"is refused: torch.save does not compress, and it unpacks to {unpacked} bytes"
                )
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)  # by name, it would go by the suffix


def _unwrap(held: object, where: str) -> dict:
    if not isinstance(held, dict):
        raise CheckpointError(f"holds one {type(held).__name__}, not a state dict")
    nested = [key for key in (*WRAPPERS, *AVERAGES) if isinstance(held.get(key), dict)]
    if not nested:
        return held
    if nested[0] in AVERAGES:
        names = ", ".join(nested)
        raise CheckpointError(f"holds only averaged weights ({names}): to use them, save that entry alone")
    if len(nested) > 1:
        warnings.warn(f"{where} holds {', '.join(nested)}: {nested[0]} is read", stacklevel=3)
    return held[nested[0]]


def _clean(held: dict) -> dict[str, Tensor]:
    for key in held:
        if not (isinstance(key, str) and key.isprintable()):
            raise CheckpointError(f"has a key that is no name: {key!r:.60}")
    odd = [f"{key} ({kind})" for key, leaf in held.items() if (kind := _oddity(leaf))]
    if odd:
        raise CheckpointError(f"holds more than dense tensors: {', '.join(odd)}")
    if not held:
        raise CheckpointError("holds no tensors")
    state = OrderedDict((key, leaf.detach()) for key, leaf in held.items())
    state._metadata = _versions(held)
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _oddity(leaf: object) -> str:
    """What keeps a leaf from being copied into a parameter, or "" for a dense tensor with data."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    if leaf.is_meta:
        return "a tensor without data"
    if leaf.is_quantized:
        return "quantized"
    return "" if leaf.layout is torch.strided else str(leaf.layout)


def _versions(held: dict) -> dict[str, dict[str, int]]:
    """The module versions that torch.save keeps with a state dict: modules migrate older weights by them."""
    kept = getattr(held, "_metadata", None)
    entries = kept.items() if isinstance(kept, dict) else ()
    return {
        name: {"version": entry["version"]}
        for name, entry in entries
        if isinstance(name, str) and isinstance(entry, dict) and type(entry.get("version")) is int
    }


def _reason(error: Exception) -> str:
    """One line. torch's own advice (load it unsafely) is left out."""
    text = str(error)
    if isinstance(error, CheckpointError):
        return text
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"is refused: it asks for {named[1]}, and only tensors are read (nothing was executed)"
    text = text.split("WeightsUnpickler error:")[-1].strip()
    first = re.split(r"\n|\. ", text, maxsplit=1)[0]
    return f"is damaged or no checkpoint: {first or type(error).__name__}"
