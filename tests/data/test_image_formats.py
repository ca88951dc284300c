"""TIFF, AVIF and HEIC: pixels, orientation, and files that are not what they say."""

import struct
import sys
import tracemalloc
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clip_exp.config.data import IMAGE_FORMATS, DataConfig
from clip_exp.data import tiff as tiff_check
from clip_exp.data.files import BadImage, ImageLimits, reads_heif
from clip_exp.data.images import decode, decode_rgb
from tests.data.conftest import noise
from tests.data.encoded import COMPRESSIONS, ORIENTATION, encoded, tiff, tiff_end, with_size

LIMITS = ImageLimits()


@pytest.fixture
def no_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heif.cache_clear()
    yield
    reads_heif.cache_clear()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def reason(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        decode_rgb(bytearray(data), limits)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LAB", "YCbCr"])
@pytest.mark.parametrize("compression", COMPRESSIONS[:3])
def test_tiffs_of_any_kind_have_pillows_pixels(mode, compression):
    data = bytearray(encoded(noise(1).convert(mode), "TIFF", compression=compression))
    image = Image.open(BytesIO(data))
    assert np.array_equal(decode_rgb(data, LIMITS).permute(1, 2, 0), array(image))
    assert np.array_equal(array(decode(data, LIMITS)), array(image))


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_a_tiff_are_scaled_in_either_byte_order(order):
    values = np.array([[0, 1000, 40000, 65535]], dtype=f"{order}u2")
    data = bytearray(encoded(Image.fromarray(values), "TIFF"))
    assert decode_rgb(data, LIMITS)[:, 0].tolist() == [[0, 3, 156, 255]] * 3
    assert array(decode(data, LIMITS))[0, :, 0].tolist() == [0, 3, 156, 255]


def test_negative_numbers_of_a_tiff_are_black():
    data = bytearray(encoded(Image.fromarray(np.array([[-70000, 40000]], dtype=np.int32)), "TIFF"))
    assert decode_rgb(data, LIMITS)[0, 0].tolist() == [0, 156]


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_avif_and_heic_look_as_they_were_drawn(kind, mode):
    image = noise(2, 64, 48).convert(mode)
    data = bytearray(encoded(image, kind, quality=95))
    for found in (decode_rgb(data, LIMITS).permute(1, 2, 0).numpy(), array(decode(data, LIMITS))):
        assert np.abs(found.astype(int) - array(image)).mean() < 8


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_training_images_are_upright(kind, orientation):
    image = noise(3, 64, 48)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = bytearray(encoded(image, kind, exif=exif.tobytes()))
    image.getexif()[ORIENTATION] = orientation
    upright = array(ImageOps.exif_transpose(image))
    found = decode_rgb(data, LIMITS).permute(1, 2, 0).numpy()
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 10


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "HEIF"])
def test_the_first_of_several_images_is_decoded(kind):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    data = bytearray(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    for red, green, blue in (decode_rgb(data, LIMITS)[:, 5, 5].tolist(), array(decode(data, LIMITS))[5, 5].tolist()):
        assert (red > 240, green < 15, blue < 15) == (True, True, True)


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_cut_files_are_refused(kind, keep):
    data = encoded(noise(4, 200, 200), kind)
    assert reason(data[: int(len(data) * keep)]).startswith(("truncated", "damaged", "not an image"))


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "HEIF"])
def test_pixels_are_limited_by_the_header(kind):
    found = reason(encoded(noise(5), kind), ImageLimits(1000))
    assert found == "too many pixels: 48 x 40 pixels, more than max_image_pixels=1000"


def test_a_heic_of_another_size_than_stated_is_damaged():
    assert reason(with_size(encoded(noise(6), "HEIF"), 6000, 6000)).startswith("damaged")
    assert reason(with_size(encoded(noise(6, 400, 400), "HEIF"), 64, 64)).startswith("damaged")


# TIFFs are refused before Pillow makes millions of objects of their tags.


@pytest.mark.parametrize(
    ("entries", "behind", "expected"),
    [
        ([(273, 4, 300_000, 110), (279, 4, 1, 10)], bytes(1_200_000), "a TIFF with a tag of 300,000 values"),
        ([(40_000 + tag, 3, 1, 0) for tag in range(5000)], b"", "a TIFF with a directory of 5,006 tags"),
        (
            [(0x8769, 4, 1, tiff_end(1))],
            struct.pack("<HHHLL", 1, 0x9000, 3, 300_000, 200) + bytes(600_200),
            "a TIFF with a tag of 300,000 values",
        ),
        ([(0x8769, 4, 1, place) for place in range(10, 40)], b"", "a TIFF with several EXIF directories"),
        ([(0x8769, 5, 1, 8)], b"", "a TIFF with an EXIF directory at a place of type 5"),
        (
            [(273, 4, 10_000, tiff_end(3)), (278, 4, 1, 1), (279, 4, 10_000, tiff_end(3))],
            struct.pack("<L", 8) * 10_000,
            "a TIFF whose 10,000 strips overlap",
        ),
    ],
)
def test_a_tiff_that_would_take_much_memory_or_time_is_refused(entries, behind, expected):
    data = bytearray(tiff(entries, behind))
    tracemalloc.start()
    assert reason(data) == f"damaged: {expected}"
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_directories_that_point_at_each_other_end(monkeypatch):
    loop = [(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 10**9)]
    assert tiff_check.problem(bytearray(tiff(loop))) is None
    assert tiff_check.problem(bytearray(b"MM\0*\xff\xff\xff\xff")) is None
    assert tiff_check.problem(bytearray(b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 10**15))) == (
        "a directory of 1,000,000,000,000,000 tags"
    )


def test_a_tile_for_every_256_pixels_is_read():
    tiles = 200
    places = [(322, 3, 1, 16), (323, 3, 1, 16), (324, 4, tiles, tiff_end(4)), (325, 4, tiles, tiff_end(4))]
    data = bytearray(tiff(places, struct.pack("<L", 8) * tiles, 16, 16 * tiles))
    assert decode_rgb(data, LIMITS).shape == (3, 16 * tiles, 16)


# Which formats are read.


def test_without_pillow_heif_the_reason_says_how_to_install_it(no_pillow_heif):
    heic = bytearray(encoded_heic())
    assert reason(heic) == "no decoder: HEIC needs pillow-heif: pip install pillow-heif"
    assert reason(heic, ImageLimits(formats=("JPEG",))) == "format not allowed: HEIF is not in data.image_formats"
    assert decode_rgb(bytearray(encoded(noise(0), "AVIF")), LIMITS).shape == (3, 40, 48)


def encoded_heic() -> bytes:
    """Return the start of a HEIC, which is all that is looked at without a decoder."""
    return struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)


def test_heic_is_read_only_where_it_is_allowed():
    heic = encoded(noise(0), "HEIF")
    assert (
        reason(heic, ImageLimits(formats=("JPEG", "AVIF"))) == "format not allowed: HEIF is not in data.image_formats"
    )
    assert torch.equal(decode_rgb(bytearray(heic), LIMITS), decode_rgb(bytearray(heic), ImageLimits(formats=("HEIF",))))


def test_formats_may_be_named_by_their_suffixes():
    config = DataConfig(name="csv", image_formats=["jpg", "Tif", "HEIC", "JPEG", "avif"])
    assert config.image_formats == ["JPEG", "TIFF", "HEIF", "AVIF"]


def test_evaluation_also_accepts_the_formats_and_large_files_of_the_run():
    run = DataConfig(name="csv", image_formats=["PPM", "TIFF"], max_image_bytes=1 << 30, max_image_pixels=10)
    assert ImageLimits.evaluated(500, run) == ImageLimits(500, 1 << 30, (*IMAGE_FORMATS, "PPM"))
    assert ImageLimits.evaluated(500) == ImageLimits(500, 256 << 20)
