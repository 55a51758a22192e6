"""The demo's photos: those that ship, a folder's, and what is wrong with a folder or a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit.demo import photos


def save_photo(path, size=(40, 30), **more):
    Image.new("RGB", size, "orange").save(path, **more)


def test_six_photos_ship():
    six = photos.load_photos()
    assert [photo.name for photo in six] == ["astronaut", "chelsea", "coffee", "rocket", "china", "flower"]
    assert all(photo.image.dtype == np.uint8 and photo.image.shape[2] == 3 for photo in six)


def test_a_folder_is_read_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        save_photo(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    assert [photo.name for photo in photos.load_photos(tmp_path)] == ["a", "b", "c"]
    assert [photo.name for photo in photos.load_photos(tmp_path, limit=2)] == ["a", "b"]


def test_exif_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    save_photo(tmp_path / "upright.jpg", exif=exif)
    assert photos.load_photos(tmp_path)[0].image.shape == (40, 30, 3)


@pytest.mark.parametrize("content", [b"", b"not a photo", b"\x89PNG\r\n\x1a\n broken"])
def test_a_corrupt_photo_is_named_with_its_size(tmp_path, content):
    save_photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"b\.png \({len(content)} bytes\) cannot be read as a photo"):
        photos.load_photos(tmp_path)


def test_a_truncated_photo_is_an_error(tmp_path):
    save_photo(tmp_path / "a.jpg", size=(640, 480))
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jpg \(\d+ bytes\) cannot be read"):
        photos.load_photos(tmp_path)


def test_folders_without_photos(tmp_path):
    with pytest.raises(ValueError, match="holds no photos"):
        photos.load_photos(tmp_path)
    with pytest.raises(ValueError, match="nowhere is missing; give a folder"):
        photos.load_photos(tmp_path / "nowhere")
    save_photo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a folder"):
        photos.load_photos(tmp_path / "a.png")


# 1 x 3000: resizing before cropping would ask for 224 x 672000.
@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (1, 1), (1, 3000)])
def test_preprocess_gives_a_square(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    out = photos.preprocess(photos.Photo("any", image))
    assert out.shape == (3, 224, 224)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()


def test_normalize():
    out = photos.normalize(torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 4, 4))
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[1, :, 2, 2], torch.tensor(expected))
