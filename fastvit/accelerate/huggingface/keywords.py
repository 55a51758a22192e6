"""Which keywords transformers' attention reads: a model hands those that it does not know to all its layers.

Trainer adds num_items_in_batch, which is for the loss alone; a layer that counted it would not be fused.
"""

import inspect
from collections.abc import Callable

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
