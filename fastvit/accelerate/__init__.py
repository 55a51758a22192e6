"""Other libraries' vision transformers on fastvit's ops, in place, block by block.

    fastvit.accelerate(model)     the same object, weights and state-dict keys, its blocks on the fused ops
    fastvit.restore(model)        what it was

A block's class is replaced by a subclass whose forward calls the ops on the block's own parameters, after
asking at each call whether everything inside is still plain; where something is not (a hook, a LoRA layer, a
weight of another type) the block runs its original forward. ``registry`` knows which class replaces which; a
file per family of models holds them, and is imported when that library is.
"""

from .huggingface.attention import register_hf
from .normalization import fold_normalize
from .swap import accelerate, restore

__all__ = ["accelerate", "fold_normalize", "register_hf", "restore"]
