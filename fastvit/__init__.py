"""fastvit: a drop-in faster Vision Transformer for PyTorch.

Importing it imports torch and nothing heavier: no triton, no CUDA, no compiled extension.
"""

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
from .explanation import Explanation, explain
from .graphed import graphed
from .tuning import Tuning, tune
from .variants import create_model, list_models
from .verification import verify
from .vit import VisionTransformer

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


def __getattr__(name: str):
    # timm is imported only by who uses it: timm.create_model(..., block_fn=fastvit.TimmBlock).
    if name == "TimmBlock":
        from .accelerate.timm_vit import Block

        return Block
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
