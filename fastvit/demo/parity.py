"""The same weights and photos through fastvit, timm and ONNX Runtime: how far apart are the tokens?"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastvit.contract import judge

from .result import ParityRow

# Both round in float32, each in its own way: the tokens reach 12, and on six photos the two
# (2.4e-5 and 4.9e-5 from the truth) were 6.4e-5 apart.
ONNX_TOLERANCE = 1e-4
_ORACLE = "timm float64"
NO_TIMM = "timm is not installed: pip install timm"


def parity_rows(
    model: nn.Module,
    timm_model: nn.Module | None,
    onnx_tokens: Callable[[Tensor], Tensor] | str,
    images: Tensor,
    half: torch.dtype | None = None,
) -> Iterator[ParityRow]:
    """A row for each comparison, in the order of the table.

    Args:
        model: fastvit's, float32.
        timm_model: timm's with the same weights; None if timm is not installed.
        onnx_tokens: images to tokens by ONNX Runtime, or in words why not.
        images: normalised, float32, on the models' device.
        half: also judge this dtype.
    """
    ours = tokens(model, images)
    if timm_model is None:
        yield ParityRow("fastvit float32", _ORACLE, note=NO_TIMM)
    else:
        oracle = tokens(copy.deepcopy(timm_model).double(), images.double())
        theirs = tokens(timm_model, images)
        yield _measured("timm float32", _ORACLE, theirs, oracle, note="the yardstick")
        yield _judged("fastvit float32", ours, oracle, theirs)
        yield _judged("fastvit float64", tokens(copy.deepcopy(model).double(), images.double()), oracle, None)
        if half is not None:
            name = str(half).removeprefix("torch.")
            their_half = tokens(copy.deepcopy(timm_model).to(half), images.to(half))
            yield _measured(f"timm {name}", _ORACLE, their_half, oracle, note="the yardstick")
            our_half = tokens(copy.deepcopy(model).to(half), images.to(half))
            yield _judged(f"fastvit {name}", our_half, oracle, their_half)
    if isinstance(onnx_tokens, str):
        yield ParityRow("fastvit float32", "ONNX Runtime", note=onnx_tokens)
    else:
        theirs = onnx_tokens(images.cpu())
        yield _measured("fastvit float32", "ONNX Runtime", ours, theirs, limit=ONNX_TOLERANCE)


@torch.inference_mode()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """[B, P + N, D] after the final norm, on the CPU, image by image so that memory stays small."""
    return torch.cat([model.forward_features(image[None]).cpu() for image in images])


def _judged(provider: str, out: Tensor, oracle: Tensor, baseline: Tensor | None) -> ParityRow:
    check = judge(provider, out, oracle, () if baseline is None else baseline, kind="model")
    largest, mean = _errors(out, oracle)
    return ParityRow(provider, _ORACLE, largest, mean, check.ok, check.reason)


def _measured(
    provider: str, against: str, out: Tensor, truth: Tensor, note: str = "", limit: float = float("inf")
) -> ParityRow:
    largest, mean = _errors(out, truth)
    if largest < limit:
        return ParityRow(provider, against, largest, mean, True, note)
    return ParityRow(provider, against, largest, mean, False, f"over {limit:g}")


def _errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    error = (out.double() - truth.double()).abs()
    return error.max().item(), error.mean().item()
