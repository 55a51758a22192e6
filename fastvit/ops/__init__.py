"""The five ops of a vision transformer: functional, differentiable, each on the best backend that is right.

Every op checks its arguments, asks `fastvit.backends` where to run, and runs there. Shapes: B images,
N tokens, D width, H heads of d channels, P prefix (class and register) tokens.
"""

# In torch's dispatcher from the start: a saved program that holds these ops is loaded after `import fastvit`.
from . import attention_native, layer_norm_linear_native, layer_norm_mlp_native, linear_residual_native  # noqa: F401
from .attention import attention
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import layer_norm_mlp
from .linear_residual import linear_residual
from .patch_embed import patch_embed

__all__ = ["attention", "layer_norm_linear", "layer_norm_mlp", "linear_residual", "patch_embed"]
