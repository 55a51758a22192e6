"""timm's layers that compute what ours do, entered into the tables of classes by what they compute."""

from timm import layers

from ..layers import attention, mlp, norm, plain, regularization
from ..layers.activation import ACTIVATION_NAMES


def enter() -> None:
    """Enter them, once or again."""
    plain.known(layers.Attention)
    attention.ATTENTIONS[layers.Attention] = None

    for layer, name in (
        (layers.LayerNorm, "layer_norm"),
        (layers.LayerNormFp32, "layer_norm"),
        (layers.RmsNorm, "rms_norm"),
        (layers.RmsNormFp32, "rms_norm"),
    ):
        norm.NORMS[plain.known(layer)] = name

    for layer, arguments in (
        (layers.Mlp, mlp.mlp_arguments),
        (layers.GluMlp, mlp.packed_swiglu_arguments),
        (layers.SwiGLU, mlp.swiglu_arguments),
    ):
        mlp.MLPS[plain.known(layer)] = arguments

    for layer, name in (
        (layers.GELU, "gelu"),
        (layers.GELUTanh, "gelu_tanh"),
        (layers.QuickGELU, "quick_gelu"),
    ):
        ACTIVATION_NAMES[plain.known(layer)] = name

    plain.known(layers.PatchEmbed)
    regularization.LAYER_SCALES[plain.known(layers.LayerScale)] = "gamma"
    regularization.DROP_PATHS[plain.known(layers.DropPath)] = regularization.bernoulli_scale
