"""`fastvit demo`: DINOv2's weights and a few photos through fastvit, timm and ONNX Runtime, on one screen."""

import dataclasses
import importlib.util
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from fastvit.errors import FastvitError

from .progress import Steps
from .result import BackendRow, DemoResult, ParityRow, TimingRow

TITLE = "DINOv2 ViT-S/14 through fastvit"
SIZE, NATIVE_SIZE = 224, 518
COMPARED = 6  # photos whose tokens are compared
_PACKAGES = {"onnx": "onnx", "matplotlib": "matplotlib"}


def run(
    photos_folder: str | Path | None = None,
    output: str | Path = "demo.png",
    console: Console | None = None,
    batch_size: int = 1,
    *,
    limit: int = 12,
    device: str | torch.device | None = None,
    rounds: int = 20,
    compile_mode: str | None = None,
) -> DemoResult:
    """Check, time and draw; prints one screen and writes the picture.

    Args:
        photos_folder: a folder of photos; without one those that scikit-image and scikit-learn ship.
        output: where the picture goes, a PNG.
        console: where the screen goes; a quiet one prints nothing.
        batch_size: images in each timed call.
        limit: at most so many photos.
        device: CUDA if there is any, else the CPU. On CUDA the times are of bfloat16, on the CPU of float32.
        rounds: of the timing.
        compile_mode: torch.compile's `mode`.

    Raises:
        ValueError: photos, weights or output that cannot be read or written, in one line.
        FastvitError: a package that the demo needs is absent.
    """
    _check(output, batch_size, limit, rounds)
    from . import features, photos, picture, screen, weights
    from .timings import batches

    console = console or Console()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = photos.load_photos(photos_folder, limit)
    with Steps(console) as step:
        step("reading the weights")
        model = _fastvit_model(weights.load_state_dict()).to(device)
        step("looking at photos", len(chosen))
        native = torch.stack([photos.preprocess(photo, NATIVE_SIZE) for photo in chosen])
        sight = features.look(model, native, step.advance)
        model.set_input_size(img_size=SIZE)
        timm_model = _timm_model(model.state_dict(), device)
        small = torch.stack([photos.preprocess(photo, SIZE) for photo in chosen[:COMPARED]])
        images = photos.normalize(small).to(device)
        parity = _parity(model, timm_model, images, step)
        inputs = batches(images.to(_dtype(device)), batch_size)
        timings = _timings(model, timm_model, inputs, rounds, compile_mode, step)
        facts = weights.MODEL_NAME, _setting(device, batch_size)
        result = DemoResult(*facts, parity, timings, tuple(backend_rows()), str(output))
        step("drawing")
        picture.draw(sight, [photo.name for photo in chosen], result, output)
    screen.show(result, console)
    return result


def backend_rows() -> list[BackendRow]:
    """Which backend each op resolves to on this machine, and why."""
    from fastvit import backends

    return [BackendRow(*row) for row in backends.describe()]


def _check(output: str | Path, batch_size: int, limit: int, rounds: int) -> None:
    """What would otherwise fail only after a minute of work."""
    output = Path(output)
    for name, value in (("batch_size", batch_size), ("limit", limit), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} must end in .png")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output} cannot be written: its folder is missing")
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise FastvitError(f"the demo needs {package}: pip install {package}")


def _fastvit_model(state: dict[str, Tensor]) -> nn.Module:
    import fastvit

    from .weights import MODEL_NAME

    model = fastvit.create_model(MODEL_NAME, num_classes=0, pos_resize="huggingface")
    model.load_state_dict(state, strict=True)
    return model.eval()


def _timm_model(state: dict[str, Tensor], device: torch.device) -> nn.Module | None:
    """timm's own, with the positions as fastvit resized them: the same weights to the last bit."""
    try:
        import timm
    except ImportError:
        return None
    from .weights import MODEL_NAME

    model = timm.create_model(MODEL_NAME, img_size=SIZE, num_classes=0, pretrained=False)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval()


def _parity(
    model: nn.Module, timm_model: nn.Module | None, images: Tensor, step: Steps
) -> tuple[ParityRow, ...]:
    from .parity import parity_rows
    from .weights import OnnxBackbone

    half = torch.bfloat16 if images.is_cuda else None
    step("comparing tokens")
    try:
        onnx_tokens = OnnxBackbone().tokens
    except ImportError:
        onnx_tokens = "onnxruntime is not installed: pip install onnxruntime"
    # TF32 convolutions are torch's default, and would be all that the comparison shows.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return tuple(parity_rows(model, timm_model, onnx_tokens, images, half))


def _timings(
    model: nn.Module,
    timm_model: nn.Module | None,
    inputs: list[Tensor],
    rounds: int,
    mode: str | None,
    step: Steps,
) -> tuple[TimingRow, ...]:
    from .timings import WARMUP, compiled_or_reason, timing_rows

    model.to(inputs[0].dtype)
    compiled = None
    if timm_model is not None:
        step("compiling timm's model for comparison")
        compiled = compiled_or_reason(timm_model.to(inputs[0].dtype), inputs[0], mode)
    step("timing", WARMUP + rounds)
    return tuple(timing_rows(model, timm_model, compiled, inputs, rounds, step.advance))


def _dtype(device: torch.device) -> torch.dtype:
    """What the times are of: what people run on such a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _setting(device: torch.device, batch_size: int) -> dict:
    from fastvit_benchmarks.harness import machine

    facts = machine()
    dtype = str(_dtype(device)).removeprefix("torch.")
    named = {"title": TITLE, "device": device.type, "dtype": dtype, "batch_size": batch_size}
    return {**dataclasses.asdict(facts), **named, "machine": facts.name}
