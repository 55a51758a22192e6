"""Which calls of an op belong to someone else: to torch.fx as it traces, or to a tensor type of its own."""

from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl
from torch.overrides import has_torch_function


def overridden(tensors: tuple[Tensor | None, ...]) -> bool:
    """True if the type of one of the tensors overrides torch's functions, as torch.fx's proxies do.

    A TorchFunctionMode alone does not count: it sees the torch functions that the op calls. Nor do types that
    override what is below those functions alone, as fake tensors do.
    """
    return has_torch_function(tensors) and any(map(_overrides, tensors))


def _overrides(tensor: Tensor | None) -> bool:
    layer = type(tensor)
    if tensor is None or layer is Tensor or layer is nn.Parameter:
        return False
    function = getattr(layer, "__torch_function__", _disabled_torch_function_impl)
    return function is not _disabled_torch_function_impl
