"""The decoder of JPEG and WebP, and what happens without it."""

import importlib.metadata
import logging
import sys
from collections.abc import Iterator

import PIL
import pytest
import torch

from clip_exp.data import decoders
from clip_exp.data.decoders import image_decoder
from clip_exp.data.files import ImageLimits
from clip_exp.data.images import decode, decode_rgb
from tests.data.conftest import noise
from tests.data.encoded import ORIENTATION, encoded


@pytest.fixture
def again() -> Iterator[None]:
    """Import the decoder again in this test, and after it."""
    decoders._torchcodec.cache_clear()
    yield
    decoders._torchcodec.cache_clear()


def photographs() -> list[bytearray]:
    exif = noise(0).getexif()
    exif[ORIENTATION] = 6
    jpeg = {"exif": exif, "progressive": True}
    return [
        bytearray(encoded(noise(6), kind, **options)) for kind, options in (("JPEG", jpeg), ("WEBP", {"exif": exif}))
    ]


def test_torchcodec_decodes_with_its_version_in_the_name(again):
    assert image_decoder() == f"torchcodec {importlib.metadata.version('torchcodec').partition('+')[0]}"
    for data, decoded in zip(photographs(), (decoders.decode_jpeg, decoders.decode_webp), strict=True):
        assert decoded(data).shape == (3, 48, 40)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_if_torchcodec_cannot_be_imported_pillow_decodes_and_one_line_names_the_versions(
    again, error, monkeypatch, caplog
):
    class Broken:
        def __getattr__(self, name: str) -> None:
            raise error("libtorch.so: undefined symbol")

    fast = [(decode_rgb(data, ImageLimits()), decode(data, ImageLimits())) for data in photographs()]
    decoders._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken())
    monkeypatch.setattr(sys.modules["torchcodec"], "decoders", Broken())
    with caplog.at_level(logging.WARNING):
        slow = [(decode_rgb(data, ImageLimits()), decode(data, ImageLimits())) for data in photographs()]
        assert image_decoder() == f"Pillow {PIL.__version__}"
    for (fast_rgb, fast_pil), (slow_rgb, slow_pil) in zip(fast, slow, strict=True):
        assert torch.equal(fast_rgb, slow_rgb)
        assert fast_pil.tobytes() == slow_pil.tobytes()
    (line,) = caplog.messages
    torchcodec = importlib.metadata.version("torchcodec").partition("+")[0]
    assert line.startswith(
        f"torchcodec {torchcodec} cannot be imported with torch {torch.__version__} ({error.__name__})"
    )


def test_an_orientation_that_comes_after_other_metadata_is_applied():
    """XMP may stand before EXIF, in a segment of the same kind."""
    (jpeg, _) = photographs()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
    data = jpeg[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + jpeg[2:]
    assert torch.equal(decode_rgb(bytearray(data), ImageLimits()), decode_rgb(jpeg, ImageLimits()))
