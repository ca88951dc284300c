"""Memory that a worker needs for the largest images within the default limits."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clip_exp.data.files import ImageLimits
from clip_exp.data.images import decode, decode_rgb
from tests.data.encoded import ORIENTATION, chunk, encoded
from tests.exhaustive import repeat_beyond
from tests.processes import start_apart

WIDTH, HEIGHT = 8000, 5000
LIMIT_MB = 500
LIMITS = ImageLimits(max_bytes=1 << 28)  # an uncompressed TIFF


def gradient(mode: str) -> Image.Image:
    gray = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    return Image.merge(mode, [gray] * len(mode))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


def png_of_zeros(color: int, depth: int, row_bytes: int) -> bytes:
    compress = zlib.compressobj(1)
    rows = b"".join(compress.compress(bytes(row_bytes + 1)) for _ in range(HEIGHT)) + compress.flush()
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


LARGEST: dict[str, Callable[[], bytes]] = {
    "RGBA PNG": lambda: encoded(gradient("RGBA"), "PNG", compress_level=1, exif=turned()),
    "gray and alpha PNG": lambda: encoded(gradient("LA"), "PNG", compress_level=1),
    "palette and alpha PNG": lambda: encoded(
        gradient("RGB").quantize(16), "PNG", compress_level=1, transparency=bytes(16)
    ),
    "16-bit gray PNG": lambda: png_of_zeros(0, 16, WIDTH * 2),
    "16-bit RGBA PNG": lambda: png_of_zeros(6, 16, WIDTH * 8),
    "JPEG on its side": lambda: encoded(gradient("RGB"), "JPEG", exif=turned()),
    "progressive CMYK JPEG": lambda: encoded(
        gradient("CMYK"), "JPEG", progressive=True, subsampling=0, exif=turned()
    ),
    "WebP": lambda: encoded(gradient("RGB"), "WEBP", method=0, quality=10, exif=turned()),
    "WebP with alpha": lambda: encoded(gradient("RGBA"), "WEBP", method=0, quality=10),
    "GIF": lambda: encoded(gradient("RGB").quantize(16), "GIF"),
    "TIFF on its side": lambda: encoded(gradient("RGB"), "TIFF", exif=turned()),
    "compressed CMYK TIFF": lambda: encoded(gradient("CMYK"), "TIFF", compression="tiff_lzw", exif=turned()),
    "AVIF": lambda: encoded(gradient("RGBA"), "AVIF", quality=20, speed=10, exif=turned()),
}  # fmt: skip


def status_mb(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def write(kind: str, path: Path) -> None:
    path.write_bytes(LARGEST[kind]())


def peak_mb(read: Callable[..., object], file: Path) -> int:
    """Return the additional memory for decoding, in MB."""
    data = bytearray(file.read_bytes())
    for kind in ("JPEG", "WEBP", "TIFF", "AVIF"):
        read(bytearray(encoded(Image.new("RGB", (8, 8)), kind)), ImageLimits())  # the decoders' libraries
    Path("/proc/self/clear_refs").write_text("5")
    before_mb = status_mb("VmRSS")
    read(data, LIMITS)
    return status_mb("VmHWM") - before_mb


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are set back as Linux does it")
@pytest.mark.parametrize("kind", repeat_beyond(("RGBA PNG", "progressive CMYK JPEG", "WebP with alpha"), LARGEST))
def test_forty_million_pixels_of_any_kind_take_less_than_500_mb(kind: str, tmp_path: Path) -> None:
    """A separate process writes the image, so that its memory is freed."""
    start_apart(write, kind, tmp_path / "largest").result()
    peaks = {read.__name__: start_apart(peak_mb, read, tmp_path / "largest").result() for read in (decode_rgb, decode)}
    assert max(peaks.values()) <= LIMIT_MB, peaks
