"""The five ops in plain torch: what fastvit computes, written to be read.

Each function is both the fallback (wherever no kernel of ours is known to be right and at least as
fast) and, in float64, the oracle that every kernel is judged against. Imports torch only.
"""

from .attention import attention
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import layer_norm_mlp
from .linear_residual import linear_residual
from .patch_embed import patch_embed

__all__ = ["attention", "layer_norm_linear", "layer_norm_mlp", "linear_residual", "patch_embed"]
