import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clip_exp.data.files import BadImage, ImageLimits, read_file
from clip_exp.data.images import decode_rgb, open_image
from tests.data.conftest import load, noise

LIMIT = 1_000_000
ORIENTATION = 0x0112


def read_image(file: Path, max_pixels: int) -> torch.Tensor:
    limits = ImageLimits(max_pixels)
    return decode_rgb(read_file(file, limits), limits)


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_has_pillows_pixels(tmp_path, mode):
    file = tmp_path / "a.jpg"
    noise(0, 61, 37).convert(mode).save(file)
    image = read_image(file, LIMIT)
    assert image.dtype == torch.uint8
    assert torch.equal(image, pixels(load(file)))


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp"])
def test_other_formats_have_pillows_pixels(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    noise(1).save(file, lossless=True)
    assert torch.equal(read_image(file, LIMIT), pixels(load(file)))


def test_real_photographs_have_pillows_pixels(real_data):
    for file in sorted((real_data / "imagenet_val_sample").glob("*/*"))[:20]:
        assert torch.equal(read_image(file, 40_000_000), pixels(ImageOps.exif_transpose(load(file)))), file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied_for_training_and_ignored_for_evaluation(tmp_path, orientation, suffix):
    picture, file = noise(2, 40, 24), tmp_path / f"a.{suffix}"
    exif = picture.getexif()
    exif[ORIENTATION] = orientation
    picture.save(file, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    stored = load(file)
    assert torch.equal(read_image(file, LIMIT), pixels(ImageOps.exif_transpose(stored)))
    assert torch.equal(pixels(open_image(file, LIMIT)), pixels(stored))


def test_sixteen_bit_grey_is_scaled_by_depth_not_clipped(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1000, 40000, 65535]], dtype=np.uint16)).save(file)
    for image in (read_image(file, LIMIT), pixels(open_image(file, LIMIT))):
        assert image[:, 0].tolist() == [[0, 3, 156, 255]] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    file = tmp_path / "a.png"
    picture.convert(mode).save(file)
    image = read_image(file, LIMIT)
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert torch.equal(image[:, 0, 0], pixels(picture.convert(mode))[:, 0, 0])


def test_a_key_color_is_transparent(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (2, 2), (1, 2, 3)).save(file, transparency=(1, 2, 3))
    assert read_image(file, LIMIT).unique().tolist() == [255]


def test_animations_give_their_first_frame(tmp_path):
    file = tmp_path / "a.gif"
    Image.new("RGB", (3, 3), "red").save(file, save_all=True, append_images=[Image.new("RGB", (3, 3), "blue")])
    assert read_image(file, LIMIT)[:, 0, 0].tolist() == [255, 0, 0]


def damaged(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_cut_files_are_refused(tmp_path, suffix, keep):
    file = tmp_path / f"a.{suffix}"
    noise(3, 200, 200).save(file)
    damaged(file, keep)
    for read in (read_image, open_image):
        with pytest.raises(BadImage):
            read(file, LIMIT)


def test_what_is_not_a_picture_is_refused_with_a_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    noise(0).save(tmp_path / "renamed.jpg", format="TIFF")
    reasons = {
        "missing.jpg": "no such file",
        "dangling.jpg": "no such file",
        "empty.jpg": "empty file",
        "page.jpg": "not a picture",
        "pipe.jpg": "not a regular file",
        "renamed.jpg": "not a picture",
        ".": "directory",
        "nul\0.jpg": "null byte",
        "x" * 300: "File name too long",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            read_image(str(tmp_path / name), LIMIT)
    with pytest.raises(BadImage, match="not a regular file"):
        read_image("/dev/zero", LIMIT)


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = 12_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (read_image, open_image):
        with pytest.raises(BadImage, match=r"12000 x 12000 pixels, more than max_image_pixels=40000000"):
            read(file, 40_000_000)
    noise(0).save(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="48 x 40"):
        read_image(tmp_path / "a.jpg", 1000)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    draw = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "gif", "bmp"):
        source = tmp_path / f"source.{suffix}"
        noise(4).save(source)
        good = np.frombuffer(source.read_bytes(), dtype=np.uint8)
        for _ in range(30):
            bad = good.copy()
            bad[draw.integers(0, len(bad), 8)] = draw.integers(0, 256, 8)
            file = tmp_path / f"bad.{suffix}"
            file.write_bytes(bad.tobytes())
            for read in (read_image, open_image):
                try:
                    read(file, LIMIT)
                except BadImage as error:
                    assert str(error)  # noqa: PT017
