"""Images that are refused before any pixel is decoded."""

import struct
import time
import tracemalloc
import zlib

import pytest
from PIL import Image, ImageFile

from clip_exp.data import files
from clip_exp.data.files import BadImage, ImageLimits, check_formats
from clip_exp.data.images import decode, decode_rgb
from tests.data.conftest import noise
from tests.data.encoded import chunk, encoded, png

JPEG = encoded(noise(0), "JPEG")
SIZE = JPEG.index(b"\xff\xc0") + 5


@pytest.fixture(autouse=True)
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("clip_exp.data.decoders.decode_jpeg", fail)
    monkeypatch.setattr("clip_exp.data.decoders.decode_webp", fail)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)


def reason(data: bytes, limits: ImageLimits | None = None) -> str:
    reasons = set()
    for read in (decode_rgb, decode):
        with pytest.raises(BadImage) as caught:
            read(bytearray(data), limits or ImageLimits())
        reasons.add(str(caught.value))
    (found,) = reasons
    return found


def jpeg_of(height: int, width: int) -> bytes:
    return JPEG[:SIZE] + struct.pack(">HH", height, width) + JPEG[SIZE + 4 :]


def test_too_many_pixels_cost_nothing():
    start = time.process_time()
    tracemalloc.start()
    limit = "pixels, more than max_image_pixels=40000000"
    assert reason(png(9_000, 9_000, zlib.compress(bytes(5000)))) == f"too many pixels: 9000 x 9000 {limit}"
    assert reason(jpeg_of(65_000, 700)) == f"too many pixels: 700 x 65000 {limit}"
    assert reason(encoded(noise(0), "WEBP"), ImageLimits(1000)).startswith("too many pixels: 48 x 40 pixels, more than")
    gif = encoded(noise(0), "GIF")
    assert reason(gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:]).startswith("too many pixels: ")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 1


def test_a_side_that_costs_more_than_the_pixels_is_refused():
    """Pillow keeps eight bytes for each row: 40 million rows of one pixel took 600 MB and four seconds."""
    for size in ((65_536, 1), (1, 40_000_000)):
        reported = f"side too long: {size[0]} x {size[1]} pixels, a side of more than 65,535"
        assert reason(png(*size, zlib.compress(bytes(100)))) == reported


def test_pillows_own_limit_is_a_reason_too():
    assert reason(png(60_000, 60_000, b"")).startswith("too many pixels: ")


def test_an_animated_webp_counts_twice_since_its_decoder_holds_four_copies():
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert reason(data, ImageLimits(3000)) == "too many pixels: 40 x 40 pixels, more than half of max_image_pixels=3000"


def test_formats_are_opened_only_where_they_are_allowed():
    tiff = encoded(noise(0), "TIFF")
    assert reason(tiff, ImageLimits(formats=("JPEG",))) == "format not allowed: TIFF is not in data.image_formats"
    with pytest.raises(BadImage, match="damaged: the pixels cannot be read"):
        decode_rgb(bytearray(tiff), ImageLimits(formats=("tiff",)))
    assert reason(JPEG, ImageLimits(formats=("PNG",))) == "format not allowed: JPEG is not in data.image_formats"


def test_no_message_has_a_byte_of_the_file(monkeypatch: pytest.MonkeyPatch):
    assert reason(b"  <!DOCTYPE html><html>") == "not an image: a web page"
    assert reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:0") == (
        "not an image: a Git LFS pointer; run `git lfs pull` in its repository"
    )
    assert reason(b"root:x:0:0:root:/root:/bin/bash\n") == reason(bytes(500)) == "not an image"

    def quote(*_: object) -> None:
        raise ValueError("invalid literal for int() with base 10: 'root:x:0:0'")

    monkeypatch.setattr(ImageFile.ImageFile, "load", quote)
    assert reason(encoded(noise(0), "PNG")) == "damaged: the pixels cannot be read"
    monkeypatch.setattr(Image, "open", quote)
    assert reason(encoded(noise(0), "PNG")) == "damaged: the header cannot be read"
    for size in range(1, 20):
        reason(b"\n" * size)


def test_a_header_that_cannot_be_read_is_damaged():
    assert reason(JPEG[:200]).startswith(("damaged", "truncated"))
    wrong = bytearray(encoded(noise(0), "PNG"))
    wrong[30] ^= 1
    assert reason(wrong).startswith("damaged")


def test_a_png_without_its_end_is_truncated():
    data = encoded(noise(0), "PNG")
    for missing in range(1, 40):
        assert reason(data[:-missing]) == "truncated: a PNG without its end marker"


def test_bombs_in_text_and_profile_are_refused():
    bomb = zlib.compress(bytes(10_000_000))
    for extra in (chunk(b"zTXt", b"comment\0\0" + bomb), chunk(b"iCCP", b"profile\0\0" + bomb)):
        assert reason(png(2, 1, zlib.compress(bytes(7)), extra=extra)) == "damaged: the header cannot be read"


def test_scans_without_end_are_refused():
    data = encoded(noise(0), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert reason(data[:scan] + data[scan:-2] * 5000 + data[-2:]).endswith("scans")
    one_component = JPEG.index(b"\xff\xda")
    lone = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    assert reason(JPEG[:one_component] + lone * 5000 + JPEG[-2:]) == "damaged: 5000 scans"


def test_pieces_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(files, "_MAX_READS", 10_000)  # a million take seconds
    flood = chunk(b"teSt", b"") * 100_000
    with pytest.raises(BadImage, match="damaged: more than 10,000 chunks in the header"):
        decode_rgb(bytearray(png(2, 1, zlib.compress(bytes(7)), extra=flood)), ImageLimits())
    comments = b"\xff\xfe\x00\x02" * 300_000
    with pytest.raises(BadImage, match="damaged: more than 10,000 chunks in the header"):
        decode_rgb(bytearray(JPEG[:2] + comments + JPEG[2:]), ImageLimits())


def test_names_of_formats_are_checked_against_pillows():
    assert not list(check_formats(["JPEG", "png", "TIFF", "AVIF", "HEIF"]))
    assert list(check_formats(["JP2"])) == ["data.image_formats: Pillow cannot read 'JP2'; did you mean JPEG2000?"]
    assert list(check_formats(["WEPB", "qqq"])) == [
        "data.image_formats: Pillow cannot read 'WEPB'; did you mean WEBP?",
        "data.image_formats: Pillow cannot read 'qqq'.",
    ]
    assert "Ghostscript" in next(check_formats(["EPS"]))
    assert list(check_formats([])) == ["data.image_formats is empty: name at least one format, such as JPEG."]
