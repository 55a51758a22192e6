"""`accelerate` and `restore`: classes are exchanged, and nothing else of the model is touched."""

import sys
import warnings
from collections.abc import Collection, Iterator
from types import MethodType

import torch
from torch import nn

from ..backends import TABLE
from ..derived import refresh
from ..layers.block import Block
from ..layers.settings import ATTRIBUTE, Settings
from ..vit import VisionTransformer
from .candidates import why_left_alone
from .idle import forget
from .registry import PARTS, REPLACEMENTS, is_replaced, load_families, original_of

MODES = ("train", "inference")


def accelerate(
    model: nn.Module,
    mode: str = "train",
    ops: Collection[str] | None = None,
    strict: bool = False,
    *,
    checkpoint: str | None = None,
    subset_drop_path: bool = False,
) -> nn.Module:
    """Run a model's vision transformer blocks and patch embedding on fastvit's ops.

    It changes the classes of modules, in place. Parameters, buffers, state-dict keys, hooks on blocks and the
    object itself stay; ``restore`` takes it back.

    Args:
        model: a model of timm, Hugging Face transformers, torchvision, open_clip or fastvit, or one that
            holds such models.
        mode: "train" reads weights where they lie, whoever writes them. "inference" says that they are
            frozen: copies are kept, packed and with LayerScale folded in. They follow all that torch records
            (edits, loading, optimizers, conversions), and at each call an element of every row is compared,
            so that merges, averages and broadcasts are seen too, on a GPU one call later. Not seen is what
            torch does not record and what leaves most elements as they were (`p.data[0, 0] = 1`): call
            `refresh` after it; `verify` compares the copies in full.
        ops: the ops to use, of fastvit.ops; the others run as torch's own. None for all.
        strict: raise where a block is left alone.
        checkpoint: "mlp": in training, what the MLPs would save for backward is computed again there.
        subset_drop_path: stochastic depth computes only the samples that it keeps, a fixed number of each
            batch (arXiv 2304.07193), in the place of one draw a sample.

    Returns:
        The same object. What is not understood is left as it is: ``explain`` says why.

    Raises:
        TypeError: for something that is no nn.Module, or is scripted.
        ValueError: for an unknown mode, op or checkpoint, a module sharded by FSDP already, or with
            ``strict`` a block that is left alone.
    """
    _check(model, mode, ops)
    if checkpoint not in (None, "mlp"):
        raise ValueError(f"checkpoint is {checkpoint!r}; it must be 'mlp' or None")
    load_families()
    others = () if ops is None else tuple(op for op in TABLE if op not in ops)
    settings = Settings(mode == "inference", others, checkpoint=checkpoint, subset=subset_drop_path)
    left = {
        name: reason
        for name, module in model.named_modules()
        if type(module) not in REPLACEMENTS and (reason := why_left_alone(module))
    }
    if strict and left:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left.items())
        raise ValueError(f"accelerate(strict=True) leaves blocks alone: {reasons}")
    if mode != "inference":
        refresh(model)  # what an earlier call had kept of its weights
    if not list(_accelerated(model, settings)):
        why = next(iter(left.values()), "it holds no block of a vision transformer that fastvit knows")
        message = f"accelerate changed nothing in {type(model).__name__}: {why}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every class is its library's own again. Weights were never changed.

    Hooks, wrappers, parametrizations and shards that came later stay; copies of weights go.

    Raises:
        ValueError: for a module whose class somebody has written as a subclass of ours. Nothing is changed.
    """
    originals = {layer: original_of(layer) for layer in {type(m) for m in model.modules() if is_replaced(m)}}
    for module in model.modules():
        if type(module) in originals:
            _exchange(module, originals[type(module)])
        module.__dict__.pop(ATTRIBUTE, None)
        forget(module)
    refresh(model)
    return model


def _accelerated(model: nn.Module, settings: Settings) -> Iterator[nn.Module]:
    for module in model.modules():
        if type(module) in REPLACEMENTS:
            _exchange(module, REPLACEMENTS[type(module)])
        if is_replaced(module):
            for child in module.children():
                if type(child) in PARTS:
                    _exchange(child, PARTS[type(child)])
        if is_replaced(module) or isinstance(module, (Block, VisionTransformer)):
            old = Settings.of(module)
            forget(module)
            module.__dict__[ATTRIBUTE] = settings._replace(mean=old.mean, std=old.std)
            yield module


def _exchange(module: nn.Module, layer: type[nn.Module]) -> None:
    """Give the module this class; methods of the old one that it holds itself become the new one's.

    Accelerate's hooks keep there the forward that they call, and transformers 4 leaves forwards.
    """
    old, own = type(module), module.__dict__
    for name, held in list(own.items()):
        if isinstance(held, MethodType) and held.__self__ is module:
            method = getattr(held, "__name__", "")
            if held.__func__ is getattr(old, method, None):
                own[name] = MethodType(getattr(layer, method), module)
    module.__class__ = layer


def _check(model: nn.Module, mode: str, ops: Collection[str] | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("accelerate cannot change a scripted model: accelerate first, or use torch.compile")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    unknown = [op for op in ops or () if op not in TABLE]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; the ops are {', '.join(TABLE)}")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded before it is imported
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if wrapped:
        raise ValueError(
            f"{wrapped[0] or 'the model'} is sharded by FSDP: accelerate the model first, then shard it"
        )
