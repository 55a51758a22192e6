"""Photos for the demo: those that scikit-image and scikit-learn ship, or a folder of the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Each lies inside its package's wheel: nothing is downloaded.
_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket")
_SCIKIT_LEARN = ("china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Photo:
    """A name to print, and uint8 RGB [H, W, 3]."""

    name: str
    image: np.ndarray


def load_photos(folder: str | Path | None = None, limit: int | None = None) -> list[Photo]:
    """The photos of a folder, sorted by name, or without one the six shipped ones; at most `limit`.

    Raises:
        ValueError: a folder that is missing or has no photos, or a photo that cannot be read.
    """
    if folder is None:
        return _shipped()[:limit]
    folder = Path(folder)
    if not folder.is_dir():
        trouble = "not a folder" if folder.exists() else "missing"
        raise ValueError(f"{folder} is {trouble}; give a folder of photos")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no photos: no file ends in {', '.join(EXTENSIONS)}")
    return [_read(path) for path in paths[:limit]]


def preprocess(photo: Photo, size: int = 224) -> Tensor:
    """The largest centred square, resized bicubically to uint8 [3, size, size]."""
    square = ImageOps.fit(Image.fromarray(photo.image), (size, size), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to float32 in ImageNet's mean and deviation, as the model was trained."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def _shipped() -> list[Photo]:
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(error.name, error.name)
        advice = f"pip install {package}, or give a folder of photos"
        raise ValueError(f"the demo's photos ship with {package}: {advice}") from None
    photos = [Photo(name, getattr(skimage.data, name)()) for name in _SCIKIT_IMAGE]
    return photos + [Photo(name[:-4], sklearn.datasets.load_sample_image(name)) for name in _SCIKIT_LEARN]


def _read(path: Path) -> Photo:
    try:
        with Image.open(path) as image:
            return Photo(path.stem, np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except Exception as error:  # a broken file makes PIL's decoders raise nearly anything
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) cannot be read as a photo: {error}") from error
