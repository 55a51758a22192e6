"""CLIP's layer, by whatever name, in transformers 5 and 4."""

import inspect

from torch import nn

from .layer import CLIP, Layer
from .version4 import ClipLayer4


class ClipLayer(Layer):
    """Mixed into a layer of transformers 5."""

    parts = CLIP


def clip_layer(original: type[nn.Module]) -> type[nn.Module]:
    """What to mix into a layer of CLIP."""
    takes_two_masks = "causal_attention_mask" in inspect.signature(original.forward).parameters
    return ClipLayer4 if takes_two_masks else ClipLayer
