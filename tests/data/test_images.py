import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from clip_exp.data.files import (
    KINDS,
    NO_DECODER,
    OUT_OF_MEMORY,
    OUTSIDE_ROOT,
    TOO_LONG,
    BadImage,
    ImageLimits,
    kind_of,
    read_file,
)
from clip_exp.data.images import decode, decode_rgb, open_image
from tests.data.conftest import load, noise
from tests.data.damaged_images import damaged_images
from tests.data.encoded import ORIENTATION, encoded, png

LIMIT = ImageLimits(1_000_000)


def read_image(file: Path, limits: ImageLimits) -> torch.Tensor:
    return decode_rgb(read_file(file, limits), limits)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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
        assert torch.equal(read_image(file, ImageLimits()), pixels(ImageOps.exif_transpose(load(file)))), file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied_for_training_and_ignored_for_evaluation(tmp_path, orientation, suffix):
    image, file = noise(2, 40, 24), tmp_path / f"a.{suffix}"
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(file, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    stored = load(file)
    assert torch.equal(read_image(file, LIMIT), pixels(ImageOps.exif_transpose(stored)))
    assert torch.equal(pixels(open_image(file, LIMIT)), pixels(stored))


def test_sixteen_bit_gray_is_scaled_by_depth_not_clipped(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1000, 40000, 65535]], dtype=np.uint16)).save(file)
    for image in (read_image(file, LIMIT), pixels(open_image(file, LIMIT))):
        assert image[:, 0].tolist() == [[0, 3, 156, 255]] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(tmp_path, mode):
    drawn = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    drawn.putpixel((1, 0), (0, 0, 0, 0))
    file = tmp_path / "a.png"
    drawn.convert(mode).save(file)
    image = read_image(file, LIMIT)
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert torch.equal(image[:, 0, 0], pixels(drawn.convert(mode))[:, 0, 0])


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


def test_what_is_not_an_image_is_refused_with_a_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    noise(0).save(tmp_path / "renamed.jpg", format="PPM")
    reasons = {
        "missing.jpg": "no such file",
        "dangling.jpg": "no such file",
        "empty.jpg": "empty file",
        "page.jpg": "not an image: a web page",
        "pipe.jpg": "not a regular file",
        "renamed.jpg": "format not allowed: PPM is not in data.image_formats",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            read_image(str(tmp_path / name), LIMIT)


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = 12_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (read_image, open_image):
        with pytest.raises(BadImage, match=r"12000 x 12000 pixels, more than max_image_pixels=40000000"):
            read(file, ImageLimits())
    noise(0).save(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="48 x 40"):
        read_image(tmp_path / "a.jpg", ImageLimits(1000))


@pytest.mark.parametrize("kind", ["plain", "lossless", "alpha"])
def test_webp_has_pillows_pixels(kind, monkeypatch):
    image = noise(5, 301, 203)
    if kind == "alpha":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = image.getexif()
    exif[ORIENTATION] = 6
    data = bytearray(encoded(image, "WEBP", lossless=kind == "lossless", exif=exif))
    fast, fast_in_its_mode = decode_rgb(data, ImageLimits()), decode(data, ImageLimits())
    monkeypatch.setattr("clip_exp.data.decoders.decode_webp", lambda data: None)
    assert torch.equal(fast, decode_rgb(data, ImageLimits()))
    in_its_mode = decode(data, ImageLimits())
    assert fast_in_its_mode.mode == in_its_mode.mode == ("RGBA" if kind == "alpha" else "RGB")
    assert fast_in_its_mode.tobytes() == in_its_mode.tobytes()
    assert fast.shape == (3, 301, 203)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_large_images_are_converted_in_pieces_with_the_same_pixels(mode, monkeypatch):
    image = noise(7, 53, 41).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 200)
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    data = bytearray(encoded(image, "TIFF" if mode in ("CMYK", "F") else "PNG", exif=exif, **options))
    limits = ImageLimits(formats=("PNG", "TIFF"))
    whole = decode_rgb(data, limits)
    monkeypatch.setattr("clip_exp.data.images._STRIP_PIXELS", 300)
    assert torch.equal(decode_rgb(data, limits), whole)
    assert whole.shape == (3, 53, 41)


def test_sixteen_bit_colors_keep_their_upper_byte():
    row = np.array([[0, 0, 0], [256, 65535, 32768]], dtype=">u2").tobytes()
    data = bytearray(png(2, 1, zlib.compress(b"\0" + row), depth=16))
    assert decode_rgb(data, ImageLimits())[:, 0].T.tolist() == [[0, 0, 0], [1, 255, 128]]


def test_inverted_cmyk_of_adobe_is_turned_back():
    """Pillow writes Adobe's marker and inverts, as Photoshop does."""
    data = bytearray(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert b"Adobe" in data
    red, green, blue = decode_rgb(data, ImageLimits())[:, 8, 8].tolist()
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


def test_half_transparent_palettes_are_laid_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    data = bytearray(encoded(palette, "PNG", transparency=bytes([128, 0])))
    assert decode_rgb(data, ImageLimits())[:, 0].T.tolist() == [[255, 127, 127], [255, 255, 255]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_only_the_first_frame_is_decoded(kind):
    frames = [noise(seed, 32, 32) for seed in range(3)]
    if kind != "MPO":
        frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    whole = bytearray(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    image = decode_rgb(whole, ImageLimits())
    assert torch.equal(image, pixels(decode(whole, ImageLimits())))
    if kind == "MPO":
        assert torch.equal(image, decode_rgb(bytearray(encoded(frames[0], "JPEG")), ImageLimits()))
        second = whole.index(b"\xff\xd8\xff", 100)
        whole[second + 20 : -2] = bytes(len(whole) - second - 22)
        assert torch.equal(decode_rgb(whole, ImageLimits()), image)
    else:
        assert image[0, 5, 5] > 250
        assert image[1:, 5, 5].max() < 5


@pytest.mark.parametrize(
    "error", [SystemError, MemoryError, struct.error, RuntimeError, KeyError, OverflowError, OSError]
)
def test_whatever_a_decoder_raises_is_a_reason(error, monkeypatch):
    def fail(*_: object) -> None:
        raise error("tile cannot extend")

    monkeypatch.setattr("clip_exp.data.decoders.decode_jpeg", lambda data: None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for read in (decode_rgb, decode):
        with pytest.raises(BadImage, match=r"(damaged|out of memory): the pixels cannot be read"):
            read(bytearray(encoded(noise(0), "JPEG")), ImageLimits())


@pytest.mark.parametrize("size", [(1, 1), (65000, 1), (1, 65000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes_are_decoded(size, kind):
    assert decode_rgb(bytearray(encoded(Image.new("RGB", size), kind)), ImageLimits()).shape == (3, *size[::-1])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_last_bytes_is_truncated(progressive):
    data = bytearray(encoded(noise(8, 120, 90), "JPEG", progressive=progressive))
    for missing in [*range(1, 60), len(data) // 2]:
        for read in (decode_rgb, decode):
            with pytest.raises(BadImage, match="truncated: "):
                read(data[:-missing], ImageLimits())


def test_a_corpus_of_damaged_images_gives_pixels_or_reasons(tmp_path):
    folder, found = tmp_path / "images", {}
    made = damaged_images(folder, 300, seed=0)
    for file in made:
        answers = set()
        for read in (decode_rgb, decode):
            start = time.process_time()
            try:
                read(read_file(folder / file.name, ImageLimits()), ImageLimits())
                answers.add("good")
            except BadImage as error:
                answers.add(kind_of(str(error)))
            assert time.process_time() - start < 5, file
        assert len(answers) == 1, (file, answers)
        (found[file],) = answers
        assert found[file] in ("good", *KINDS)
    assert {file: kind for file, kind in found.items() if file.expected not in (None, kind)} == {}
    assert set(found.values()) >= {"good", *KINDS} - {OUT_OF_MEMORY, TOO_LONG, OUTSIDE_ROOT, NO_DECODER}


def test_a_seed_makes_the_same_corpus(tmp_path):
    one, same, other = (damaged_images(tmp_path / name, 80, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same
    assert one != other
    regular = [file.name for file in one if file.way in ("plain", "flipped_bits", "cut", "turned")]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in regular)


def test_a_worker_keeps_libjpegs_doubts_to_itself(capfd):
    """The warnings do not name the file. In other processes, threads may write to the same terminal."""
    data = bytearray(encoded(noise(9, 200, 200), "JPEG"))
    data[-200:-2] = b"\x11" * 198
    decode_rgb(data, ImageLimits())
    assert "Corrupt JPEG data" in capfd.readouterr().err  # what is kept from workers
    loader = DataLoader([data], batch_size=None, num_workers=1, collate_fn=Decode())
    assert next(iter(loader)).shape == (3, 200, 200)
    assert capfd.readouterr().err == ""


class Decode:
    def __call__(self, data: bytearray) -> torch.Tensor:
        return decode_rgb(data, ImageLimits())
