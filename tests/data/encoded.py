"""Image files as bytes: encoded by Pillow, or PNGs assembled from chunks."""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # the key in EXIF
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
Draw = np.random.Generator


def image(draw: Draw, mode: str = "RGB") -> Image.Image:
    width, height = draw.integers(9, 80, 2).tolist()
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def any_format(draw: Draw) -> bytes:
    kind = str(draw.choice(list(SUFFIXES)))
    return encoded(image(draw), kind, **({"progressive": bool(draw.integers(2))} if kind == "JPEG" else {}))


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """Return 20 kB that decompress to a thousand times their size."""
    return zlib.compress(bytes(20_000_000))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
