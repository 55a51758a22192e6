"""Which of other libraries' classes are replaced by which of ours, and which are known to be left alone.

Ours are subclasses of the same name in modules of their own, so that a model that was accelerated pickles,
copies and prints as before, and ``isinstance`` holds.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import ClassVar

from torch import nn

# Our module, by the library's module whose classes it replaces: imported once that one is.
FAMILIES = {
    "timm.models.vision_transformer": "timm_vit",
    "timm.models.eva": "timm_eva",
    "timm.models.vitamin": "timm_vitamin",
    "torchvision.models.vision_transformer": "torchvision",
    "open_clip.transformer": "open_clip",
    "transformers.models.vit.modeling_vit": "huggingface.vit",
    "transformers.models.deit.modeling_deit": "huggingface.deit",
    "transformers.models.vit_mae.modeling_vit_mae": "huggingface.vit_mae",
    "transformers.models.vit_msn.modeling_vit_msn": "huggingface.vit_msn",
    "transformers.models.ijepa.modeling_ijepa": "huggingface.ijepa",
    "transformers.models.dinov2.modeling_dinov2": "huggingface.dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": (
        "huggingface.dinov2_with_registers"
    ),
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "huggingface.dinov3",
    "transformers.models.clip.modeling_clip": "huggingface.clip",
    "transformers.models.metaclip_2.modeling_metaclip_2": "huggingface.metaclip_2",
    "transformers.models.siglip.modeling_siglip": "huggingface.siglip",
    "transformers.models.siglip2.modeling_siglip2": "huggingface.siglip2",
    "transformers.models.aimv2.modeling_aimv2": "huggingface.aimv2",
}
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {}
# The same for classes that are replaced only as the direct children of a replaced module.
PARTS: dict[type[nn.Module], type[nn.Module]] = {}
# Classes of blocks that are understood well enough to say why the ops do not compute them.
LEFT_ALONE: dict[type[nn.Module], str] = {}
_tried: set[str] = set()


class Replacement:
    """Mixed into each class of ours."""

    original: ClassVar[type[nn.Module]]  # the library's, whose place it takes


def outlives_restore(method: FunctionType) -> FunctionType:
    """Decorator of a method that a class of ours overrides: on what is no longer ours, the library's runs.

    Wrappers hold bound methods and call them after ``restore`` too: Accelerate's hooks, patched forwards.
    """

    @functools.wraps(method)
    def outliving(self: nn.Module, *args, **kwargs):
        if isinstance(self, Replacement):
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    # torch.compile keeps what it compiled by code objects, a few for each: they are not to share one.
    outliving.__code__ = outliving.__code__.replace(co_name=method.__name__)
    return outliving


def replaces(
    original: type[nn.Module], table: dict[type[nn.Module], type[nn.Module]] = REPLACEMENTS
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: this subclass of ``original`` takes its place, by this table."""

    def register(replacement: type[nn.Module]) -> type[nn.Module]:
        replacement.original = original
        table[original] = replacement
        return replacement

    return register


def load_families() -> None:
    """Import ours for every library that has been imported; one whose version does not fit is named, once."""
    for library, name in FAMILIES.items():
        if library in sys.modules and library not in _tried:
            _tried.add(library)
            try:
                importlib.import_module(f"{__package__}.{name}")
            except (ImportError, AttributeError) as error:
                warnings.warn(f"fastvit does not fit this {library}: {error}", stacklevel=4)


def classes(module: ModuleType, *names: str) -> list[type[nn.Module]]:
    """The classes of a library that there are by these names, of which older versions lack some."""
    return [getattr(module, name) for name in names if hasattr(module, name)]


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's class is one of ours now, or was made from one of ours, as FSDP makes them."""
    return isinstance(module, Replacement)


def library_class(layer: type[nn.Module]) -> type[nn.Module]:
    """The library's class for which one of ours, or one made from ours, stands; any other itself."""
    return getattr(layer, "original", layer)


def original_of(layer: type[nn.Module]) -> type[nn.Module]:
    """The library's class that a class of ours replaces.

    FSDP and torch's parametrizations give a module a subclass of its class, made for it: of such a class,
    what they would have made of the library's.

    Raises:
        ValueError: for a subclass of ours that somebody has written.
    """
    if not issubclass(layer, Replacement):
        return layer
    if "original" in vars(layer):
        return layer.original
    written = getattr(sys.modules.get(layer.__module__), layer.__name__, None)
    if written is layer or "<locals>" in layer.__qualname__:
        raise ValueError(
            f"restore has changed nothing: {layer.__module__}.{layer.__qualname__} is written as a subclass "
            "of fastvit's; put modules of the library's own classes in the place of its modules first"
        )
    made = type(layer)(layer.__name__, tuple(map(original_of, layer.__bases__)), {})
    # What is there already is the library's: transformers wraps the forward of every subclass.
    for name in vars(layer).keys() - vars(made).keys() | {"__module__"}:
        setattr(made, name, vars(layer)[name])
    return made
