"""Which of other libraries' classes are replaced by which of ours, and which are known to be left alone.

Ours are subclasses of the same name in modules of their own, so that a model that was accelerated pickles,
copies and prints as before, and ``isinstance`` holds.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

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


def original_of(layer: type[nn.Module]) -> type[nn.Module]:
    """The library's class that one of ours replaces; itself for any other class."""
    return getattr(layer, "original", layer)


def is_replaced(module: nn.Module) -> bool:
    """Whether the module is one of ours now."""
    original = getattr(type(module), "original", None)
    return original is not None and type(module) in (REPLACEMENTS.get(original), PARTS.get(original))
