"""Which calls of an op belong to someone else: to torch.fx as it traces, or to a tensor type of its own."""

from torch import Tensor, nn
from torch.overrides import has_torch_function


def overridden(tensors: tuple[Tensor | None, ...]) -> bool:
    """True if the type of one of the tensors overrides torch's functions, as torch.fx's proxies do.

    A TorchFunctionMode alone does not count: it sees the torch functions that the op calls.
    """
    return has_torch_function(tensors) and any(
        type(tensor) not in (Tensor, nn.Parameter) and has_torch_function((tensor,)) for tensor in tensors
    )
