"""fastvit: a drop-in faster Vision Transformer for PyTorch.

Importing it imports torch and nothing heavier: no triton, no CUDA, no compiled extension.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import ops
from .accelerate import accelerate, fold_normalize, register_hf, restore
from .backends import use_backend
from .checkpoint import load_checkpoint
from .derived import refresh
from .errors import (
    BackendUnavailable,
    CheckpointError,
    ExtensionMismatch,
    ExtensionNotBuilt,
    FastvitError,
    ParityError,
)
from .graphed import graphed
from .variants import create_model, list_models
from .vit import VisionTransformer

if TYPE_CHECKING:
    from .explanation import Explanation, explain
    from .tuning import Tuning, tune
    from .verification import verify

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "Explanation",
    "ExtensionMismatch",
    "ExtensionNotBuilt",
    "FastvitError",
    "ParityError",
    "Tuning",
    "VisionTransformer",
    "accelerate",
    "create_model",
    "explain",
    "fold_normalize",
    "graphed",
    "list_models",
    "load_checkpoint",
    "ops",
    "refresh",
    "register_hf",
    "restore",
    "tune",
    "use_backend",
    "verify",
]


# Imported by who uses them: timm is heavy, and a worker's start needs none of the tools.
_ON_REQUEST = {
    "TimmBlock": ("accelerate.timm_vit", "Block"),
    "Explanation": ("explanation", "Explanation"),
    "explain": ("explanation", "explain"),
    "Tuning": ("tuning", "Tuning"),
    "tune": ("tuning", "tune"),
    "verify": ("verification", "verify"),
}


def __getattr__(name: str):
    if name not in _ON_REQUEST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ON_REQUEST[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_REQUEST})
