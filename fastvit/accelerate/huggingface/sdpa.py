"""What transformers' "sdpa" computes: which keywords it reads, and for which models it is made.

A model hands the keywords that it does not know to all its layers. Trainer's num_items_in_batch is for the
loss alone: a layer that minded it would never be fused in training.
"""

import functools
import inspect
import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def read_by(function: Callable) -> frozenset[str]:
    """The keywords that a function can read: its parameters, and the strings in its code.

    A name that is neither can only be reached by passing ``**kwargs`` on. "sdpa" does that for a ``cache``
    alone, which is a parameter; no model's "eager" does.
    """
    parameters = inspect.signature(function).parameters.values()
    named = {each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
    return frozenset(named).union(text for text in function.__code__.co_consts if isinstance(text, str))


READ_BY_SDPA = read_by(sdpa_attention_forward)


@torch.compiler.assume_constant_result
@functools.cache
def takes_sdpa(layer: type[nn.Module]) -> bool:
    """Whether transformers lets the models beside this class of attention run on "sdpa".

    Those that it does not compute more than attention does, sinks for example, in keywords that "sdpa" would
    pass by. Their ``set_attn_implementation`` refuses "sdpa", and takes any other name unseen.
    """
    beside = vars(sys.modules[layer.__module__]).values()
    models = [each for each in beside if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    own = [each for each in models if each.__module__ == layer.__module__]
    return not own or any(each._supports_sdpa for each in own)
