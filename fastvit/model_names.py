"""A model by the name that a user gives: ours, timm's, or a folder of a Hugging Face model."""

from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .checkpoint import load_checkpoint
from .variants import create_model, list_models


class NamedModel(NamedTuple):
    """``library`` is whose implementation it is. ``is_random``: its weights were drawn, not loaded."""

    model: nn.Module
    library: str
    is_random: bool


def load_model(name: str, checkpoint: Path | None = None) -> NamedModel:
    """Build the model, with weights from ``checkpoint`` or from the folder that the name is; no downloads.

    Raises:
        ValueError: for a name that is none of these, or weights given for a folder that has its own.
        CheckpointError: if the weights cannot be read or do not fit.
        ImportError: for a folder, without transformers.
    """
    if name in list_models():
        return NamedModel(create_model(name, checkpoint), "fastvit", checkpoint is None)
    if Path(name, "config.json").is_file():
        if checkpoint is not None:
            raise ValueError(f"{name} is a folder with weights of its own: leave --checkpoint out")
        return NamedModel(_from_folder(name), "transformers", False)
    model = _from_timm(name)
    if model is None:
        raise ValueError(f"unknown model {name!r}: {_advice(name)}")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return NamedModel(model, "timm", checkpoint is None)


def _from_folder(folder: str) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, local_files_only=True)


def _from_timm(name: str) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model(name) if timm.is_model(name) else None


def _advice(name: str) -> str:
    try:
        import timm
    except ImportError:
        return "fastvit has no variant of that name, and timm is not installed"
    close = get_close_matches(name, [*list_models(), *timm.list_models()], n=3)
    meant = f"; did you mean {', '.join(close)}?" if close else ""
    return f"it is no variant of fastvit, no model of timm, and no folder with a config.json{meant}"
