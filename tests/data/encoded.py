"""Image files as bytes: encoded by Pillow, or PNGs assembled from chunks."""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from clip_exp.data.files import reads_heif

ORIENTATION = 0x0112  # the key in EXIF
SUFFIXES = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif", "HEIF": "heic",
}  # fmt: skip
COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")  # of a TIFF
Draw = np.random.Generator


def image(draw: Draw, mode: str = "RGB") -> Image.Image:
    width, height = draw.integers(9, 80, 2).tolist()
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    if kind == "HEIF":
        assert reads_heif(), "pip install pillow-heif"
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def any_format(draw: Draw) -> bytes:
    kind = str(draw.choice(list(SUFFIXES)))
    options: dict[str, object] = {"progressive": bool(draw.integers(2))} if kind == "JPEG" else {}
    if kind == "TIFF":
        options = {"compression": COMPRESSIONS[draw.integers(len(COMPRESSIONS))]}
    return encoded(image(draw), kind, **options)


def tiff(entries: Sequence[tuple[int, int, int, int]], behind: bytes = b"", width: int = 60, height: int = 60) -> bytes:
    """Return an uncompressed gray TIFF.

    Args:
        entries: further tags: number, type, count, and the value or its position in the file.
        behind: bytes behind the directory, at `tiff_end(entries)`.
    """
    basic = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    directory = sorted([*basic, *entries])
    packed = b"".join(struct.pack("<HHLL", *entry) for entry in directory)
    return b"II*\0" + struct.pack("<LH", 8, len(directory)) + packed + bytes(4) + behind


def tiff_end(entries: int) -> int:
    """Return the position of the bytes behind the directory of `tiff` with a number of further tags."""
    return 14 + 12 * (6 + entries)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Return a HEIF or AVIF whose container states another size than its encoded image."""
    return re.sub(rb"(?s)(ispe\0{4}).{8}", lambda found: found[1] + struct.pack(">II", width, height), data)


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """Return 20 kB that decompress to a thousand times their size."""
    return zlib.compress(bytes(20_000_000))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
