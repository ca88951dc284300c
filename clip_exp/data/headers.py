"""What a picture is, before any pixel is decoded: its format, its size, and whether its end is there. No torch."""

import difflib
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO

from PIL import ExifTags, Image, ImageFile

from clip_exp.data.files import (
    DAMAGED,
    NOT_A_PICTURE,
    NOT_ALLOWED,
    OUT_OF_MEMORY,
    TOO_LONG,
    TOO_MANY_PIXELS,
    TRUNCATED,
    BadImage,
    ImageLimits,
    reason_of,
    unopened,
)
from clip_exp.storage import LFS_POINTER

JPEGS = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind it
ON_THEIR_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
RUNS_PROGRAMS = ("EPS",)
MAX_SIDE = 65_535  # pixels, the most that JPEG and GIF can say; millions of rows of a pixel would take more memory than the pixels
_SCAN = re.compile(b"\xff\xda")
_MAX_SCANS = 100
_MAX_READS = 1_000_000
_COUNTED_BYTES = 1 << 20
_GUESSED_BYTES = 64


class _Bytes(BytesIO):
    """A header of millions of empty pieces, which takes some MB, would keep Pillow busy for a minute: its reading is ended."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise BadImage(f"{DAMAGED}: more than {_MAX_READS:,} pieces")
        return super().read(size)


def open_picture(data: bytearray, limits: ImageLimits) -> ImageFile.ImageFile:
    """Pillow's view of a picture whose header passes the limits; nothing is decoded yet.

    Raises: BadImage with the reason.
    """
    try:
        stream = _Bytes(data) if len(data) > _COUNTED_BYTES else BytesIO(data)
        picture = Image.open(stream, formats=limits.formats)
    except Image.UnidentifiedImageError as error:
        raise BadImage(_unidentified(data, limits.formats)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"{TOO_MANY_PIXELS}: {reason_of(error)}") from error
    except Exception as error:
        raise bad_image(error, "header") from error
    _check_pixels(picture, limits.max_pixels)
    if picture.format in JPEGS:
        _check_jpeg(picture, data)
    elif picture.format == "PNG" and not 0 <= data.rfind(b"IEND") <= len(data) - 8:
        raise BadImage(f"{TRUNCATED}: a PNG without its end")
    return picture


def orientation_of(picture: Image.Image) -> int:
    """How EXIF says that a picture lies in its file: 1 is upright, 2 to 8 are turned or mirrored."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def bad_image(error: Exception, part: str = "pixels") -> BadImage:
    """Return the reason for what a library raised, whose own text is left out: it may quote the file.

    Args:
        part: what was being read.
    """
    if isinstance(error, BadImage):
        return error
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImage(NOT_A_PICTURE)
    if isinstance(error, OSError) and error.errno is not None:
        return BadImage(unopened(error))
    text = str(error).lower()
    kind = OUT_OF_MEMORY if isinstance(error, MemoryError) else TRUNCATED if "truncated" in text else DAMAGED
    return BadImage(f"{kind}: its {part} cannot be read")


def check_formats(names: Iterable[str]) -> Iterator[str]:
    """What is wrong with `data.image_formats`, a line each."""
    names = list(names)
    if not names:
        yield "data.image_formats is empty: no picture could be read."
    Image.init()
    for name in names:
        if name.upper() in RUNS_PROGRAMS:
            yield f"data.image_formats: {name} pictures are programs, which Ghostscript would run; leave it out."
        elif name.upper() not in Image.OPEN:
            aliases = {suffix.strip(".").upper(): known for suffix, known in Image.registered_extensions().items()}
            near = aliases.get(name.upper()) or next(iter(difflib.get_close_matches(name.upper(), Image.OPEN, 1)), None)
            yield f"data.image_formats: Pillow reads no {name!r}{f'; did you mean {near}?' if near else '.'}"


def _check_pixels(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    animated_webp = picture.format == "WEBP" and getattr(picture, "is_animated", False)
    if width * height > (max_pixels // 2 if animated_webp else max_pixels):
        half = "half of " * animated_webp  # its decoder holds four copies
        raise BadImage(f"{TOO_MANY_PIXELS}: {width} x {height} pixels, more than {half}max_image_pixels={max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{TOO_LONG}: {width} x {height} pixels, a side of more than {MAX_SIDE:,}")
    if not width * height:
        raise BadImage(f"{DAMAGED}: {width} x {height} pixels")


def _check_jpeg(picture: ImageFile.ImageFile, data: bytearray) -> None:
    """Each scan passes over all blocks of a picture, and costs as few as ten bytes: thousands of them take minutes."""
    assert picture.fp is not None
    pixels = picture.fp.tell() if picture.format == "JPEG" else 0  # where they begin; of an MPO Pillow does not tell
    if data.rfind(b"\xff\xd9", pixels) < 0:
        raise BadImage(f"{TRUNCATED}: a JPEG without its end")
    scan = data.rfind(b"\xff\xda", 0, pixels)
    all_at_once = scan >= 0 and "progressive" not in picture.info and data[scan + 4] == getattr(picture, "layers", 0)
    if not all_at_once and (scans := len(_SCAN.findall(data, max(scan, 0)))) > _MAX_SCANS:
        raise BadImage(f"{DAMAGED}: {scans} scans")


def _unidentified(data: bytearray, allowed: tuple[str, ...]) -> str:
    found = _formats_by_magic(bytes(data[:16]))
    if not found:
        return f"{NOT_A_PICTURE}{_guess(data)}"
    if known := [name for name in found if name in map(str.upper, allowed)]:
        return f"{DAMAGED}: a {known[0]} whose header cannot be read"
    return f"{NOT_ALLOWED}: {found[0]}, which is not in data.image_formats"


def _guess(data: bytearray) -> str:
    """Say what lies where an image should be, in the two usual cases."""
    if data.startswith(LFS_POINTER):
        return ": a Git-LFS pointer; run `git lfs pull` there"
    return ": a web page" if data[:_GUESSED_BYTES].lstrip().startswith(b"<") else ""


def _formats_by_magic(prefix: bytes) -> list[str]:
    Image.init()
    found = []
    for name, (_, accept) in Image.OPEN.items():
        with suppress(IndexError, struct.error):  # a file of a few bytes
            if accept is not None and accept(prefix) is True:
                found.append(name)
    return found
