"""Image files, before a pixel is decoded: their bytes, their headers, and when two are the same. No torch.

Nothing is trusted: only what may be read is, and each refusal has a reason. A reason is one of the kinds below, and mostly a colon and
what is known beyond that: `too many bytes: 70000000, more than max_image_bytes=67108864`. Bad images are counted by kind (`kind_of`).
"""

import difflib
import errno
import os
import posixpath
import re
import stat
import struct
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile

from clip_exp.config.data import DataConfig
from clip_exp.storage import LFS_POINTER

NO_SUCH_FILE = "no such file"  # a link that leads nowhere included
NOT_A_FILE = "not a regular file"  # a folder, a pipe, a device, a socket
CANNOT_OPEN = "cannot be opened"  # permissions, a name that no file can have, an error of the disk
OUTSIDE_ROOT = "outside the data root"
EMPTY_FILE = "empty file"
TOO_MANY_BYTES = "too many bytes"
TOO_MANY_PIXELS = "too many pixels"
TOO_LONG = "too long a strip"  # for a decoder, or for evaluation, whose resizing would make it longer still
NOT_AN_IMAGE = "not an image"
NOT_ALLOWED = "format not allowed"
TRUNCATED = "truncated"
DAMAGED = "damaged"
OUT_OF_MEMORY = "out of memory"
KINDS = (
    NO_SUCH_FILE, NOT_A_FILE, CANNOT_OPEN, OUTSIDE_ROOT, EMPTY_FILE, TOO_MANY_BYTES,
    TOO_MANY_PIXELS, TOO_LONG, NOT_AN_IMAGE, NOT_ALLOWED, TRUNCATED, DAMAGED, OUT_OF_MEMORY,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_EVALUATED_BYTES = 256 << 20  # of an image in evaluation and inference
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_UNLIKE_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageLimits:
    """What images may be."""

    max_pixels: int = 40_000_000  # width times height; judged from the header, before any pixel is decoded
    max_bytes: int = 64 << 20  # of the file; judged before it is read
    formats: tuple[str, ...] = FORMATS  # Pillow's names
    outside_root: bool = False  # whether a relative path of a table may leave its root by `..`

    @classmethod
    def of(cls, config: DataConfig) -> "ImageLimits":
        return cls(
            config.max_image_pixels, config.max_image_bytes, tuple(config.image_formats), config.allow_outside_root
        )


def kind_of(reason: str) -> str:
    """The kind of fault that a reason begins with: `truncated` of `truncated: 12 of 90 bytes`."""
    return reason.partition(":")[0]


def reason_of(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


# Bytes: of a regular file or a member of a shard, within the limits.


def read_file(path: str | Path, limits: ImageLimits) -> bytearray:
    """Return the bytes of a regular file; a pipe or a device is refused without waiting for it. Links are followed.

    Every image that a command opens by its path is read here: no message has a byte of the file.

    Raises: BadImage with the reason.
    """
    # What is judged is what was opened: between a look at the path and its opening it may become another file.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(unopened(error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{NOT_A_FILE}: {_UNLIKE_FILES.get(stat.S_IFMT(status.st_mode), 'something else')}")
        _check_size(status.st_size, limits)
        return _read(descriptor, status.st_size)
    except OSError as error:
        raise BadImage(unopened(error)) from error
    finally:
        os.close(descriptor)


def leaves_root(path: str) -> bool:
    """Return whether a relative path leaves the folder that it starts from by `..`, if only for a part of the way.

    Judged by its text: an absolute path is meant as it is, and so is where a link in the folder leads.
    """
    if os.path.isabs(path):
        return False
    depth = 0
    for part in path.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def read_from_root(root: Path, path: str, limits: ImageLimits) -> bytearray:
    """`read_file` of a path as a table has it, which starts from `root` if it is relative.

    Raises: BadImage with the reason.
    """
    if not limits.outside_root and leaves_root(path):
        raise BadImage(f"{OUTSIDE_ROOT}: its path leaves it by `..`; to allow that, set allow_outside_root=true")
    return read_file(root / path, limits)


def read_member(shard: Path, offset: int, size: int, limits: ImageLimits) -> bytearray:
    """The bytes of a member of a shard.

    Raises: BadImage with the reason.
    """
    _check_size(size, limits)
    try:
        with open(shard, "rb", buffering=0) as file:
            file.seek(offset)
            return _read(file.fileno(), size)
    except OSError as error:
        raise BadImage(unopened(error)) from error


def unopened(error: Exception) -> str:
    """Return the reason for an error of opening or reading a file."""
    number = getattr(error, "errno", None)
    if number in _MISSING:
        return NO_SUCH_FILE
    if number == errno.ENXIO:
        return f"{NOT_A_FILE}: {_UNLIKE_FILES[stat.S_IFSOCK]}"
    return f"{CANNOT_OPEN}: {reason_of(error)}"


def _check_size(size: int, limits: ImageLimits) -> None:
    if size <= 0:
        raise BadImage(EMPTY_FILE)
    if size > limits.max_bytes:
        raise BadImage(f"{TOO_MANY_BYTES}: {size}, more than max_image_bytes={limits.max_bytes}")


def _read(descriptor: int, size: int) -> bytearray:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size and (count := os.readv(descriptor, [view[filled:]])):
        filled += count
    if filled < size:
        raise BadImage(f"{TRUNCATED}: the file ends after {filled} of {size} bytes")
    return data


# Headers: what an image is, its size, and whether its end is there.

JPEGS = ("JPEG", "MPO")  # an MPO is a JPEG with further images behind it
ON_THEIR_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
RUNS_PROGRAMS = ("EPS",)
MAX_SIDE = 65_535  # pixels, the most that JPEG and GIF can say; millions of rows of a pixel would take more memory than the pixels
_SCAN = re.compile(b"\xff\xda")
_MAX_SCANS = 100
_MAX_READS = 1_000_000
_COUNTED_BYTES = 1 << 20
_GUESSED_BYTES = 64


def open_image_bytes(data: bytearray, limits: ImageLimits) -> ImageFile.ImageFile:
    """Pillow's view of an image whose header passes the limits; nothing is decoded yet.

    Raises: BadImage with the reason.
    """
    try:
        stream = _Bytes(data) if len(data) > _COUNTED_BYTES else BytesIO(data)
        image = Image.open(stream, formats=limits.formats)
    except Image.UnidentifiedImageError as error:
        raise BadImage(_unidentified(data, limits.formats)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"{TOO_MANY_PIXELS}: {reason_of(error)}") from error
    except Exception as error:
        raise bad_image(error, "header") from error
    width, height = image.size
    # The decoder of an animated WebP holds four copies.
    half = image.format == "WEBP" and getattr(image, "is_animated", False)
    if width * height > (limits.max_pixels // 2 if half else limits.max_pixels):
        most = f"{'half of ' * half}max_image_pixels={limits.max_pixels}"
        raise BadImage(f"{TOO_MANY_PIXELS}: {width} x {height} pixels, more than {most}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{TOO_LONG}: {width} x {height} pixels, a side of more than {MAX_SIDE:,}")
    if not width * height:
        raise BadImage(f"{DAMAGED}: {width} x {height} pixels")
    if image.format in JPEGS:
        _check_jpeg(image, data)
    elif image.format == "PNG" and not 0 <= data.rfind(b"IEND") <= len(data) - 8:
        raise BadImage(f"{TRUNCATED}: a PNG without its end")
    return image


def orientation_of(image: Image.Image) -> int:
    """How EXIF says that an image lies in its file: 1 is upright, 2 to 8 are turned or mirrored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
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
        return BadImage(NOT_AN_IMAGE)
    if isinstance(error, OSError) and error.errno is not None:
        return BadImage(unopened(error))
    text = str(error).lower()
    kind = OUT_OF_MEMORY if isinstance(error, MemoryError) else TRUNCATED if "truncated" in text else DAMAGED
    return BadImage(f"{kind}: its {part} cannot be read")


def check_formats(names: Iterable[str]) -> Iterator[str]:
    """What is wrong with `data.image_formats`, a line each."""
    names = list(names)
    if not names:
        yield "data.image_formats is empty: no image could be read."
    Image.init()
    for name in names:
        if name.upper() in RUNS_PROGRAMS:
            yield f"data.image_formats: {name} images are programs, which Ghostscript would run; leave it out."
        elif name.upper() not in Image.OPEN:
            aliases = {suffix.strip(".").upper(): known for suffix, known in Image.registered_extensions().items()}
            near = aliases.get(name.upper()) or next(iter(difflib.get_close_matches(name.upper(), Image.OPEN, 1)), None)
            yield f"data.image_formats: Pillow reads no {name!r}{f'; did you mean {near}?' if near else '.'}"


class _Bytes(BytesIO):
    """A header of millions of empty pieces, which takes some MB, would keep Pillow busy for a minute: its reading is ended."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise BadImage(f"{DAMAGED}: more than {_MAX_READS:,} pieces")
        return super().read(size)


def _check_jpeg(image: ImageFile.ImageFile, data: bytearray) -> None:
    """Each scan passes over all blocks of an image, and costs as few as ten bytes: thousands of them take minutes."""
    assert image.fp is not None
    pixels = image.fp.tell() if image.format == "JPEG" else 0  # where they begin; of an MPO Pillow does not tell
    if data.rfind(b"\xff\xd9", pixels) < 0:
        raise BadImage(f"{TRUNCATED}: a JPEG without its end")
    scan = data.rfind(b"\xff\xda", 0, pixels)
    all_at_once = scan >= 0 and "progressive" not in image.info and data[scan + 4] == getattr(image, "layers", 0)
    if not all_at_once and (scans := len(_SCAN.findall(data, max(scan, 0)))) > _MAX_SCANS:
        raise BadImage(f"{DAMAGED}: {scans} scans")


def _unidentified(data: bytearray, allowed: tuple[str, ...]) -> str:
    """Say what lies where an image should be, which Pillow has not recognized."""
    Image.init()
    found = []
    for name, (_, accept) in Image.OPEN.items():
        with suppress(IndexError, struct.error):  # a file of a few bytes
            if accept is not None and accept(bytes(data[:16])) is True:
                found.append(name)
    if known := [name for name in found if name in map(str.upper, allowed)]:
        return f"{DAMAGED}: a {known[0]} whose header cannot be read"
    if found:
        return f"{NOT_ALLOWED}: {found[0]}, which is not in data.image_formats"
    if data.startswith(LFS_POINTER):
        return f"{NOT_AN_IMAGE}: a Git-LFS pointer; run `git lfs pull` there"
    is_page = data[:_GUESSED_BYTES].lstrip().startswith(b"<")
    return f"{NOT_AN_IMAGE}: a web page" if is_page else NOT_AN_IMAGE


# Names: when two are one file, without following every link; big tables have millions of them.


def normal_path(path: str) -> str:
    """Return a path as absolute and without empty, `.` and `..` parts: the names of a file that differ in these are equal then.

    The result names the same file. `x/..` is the folder above x, and where x is a link, the one above its target; where x is no
    folder, nothing is found that way, and it stays. Other links are not followed: two links to a file are two names.

    Args:
        path: as it is written; a relative one starts from the working directory.
    """
    absolute = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    if "/.." not in absolute:
        normal = posixpath.normpath(absolute)
        return normal[1:] if normal.startswith("//") else normal  # which POSIX lets mean something else
    found = ""
    for part in absolute.split("/"):
        if part == "..":
            found = _above(found)
        elif part not in ("", "."):
            found = f"{found}/{part}"
    return found or "/"


@lru_cache(maxsize=1 << 16)
def _above(folder: str) -> str:
    """Return the normal path of `folder/..`, where `/` is written as nothing."""
    if not folder:
        return ""
    if not os.path.isdir(folder):
        return f"{folder}/.."
    if os.path.islink(folder):
        return _above(normal_path(os.path.join(os.path.dirname(folder), os.readlink(folder))).rstrip("/"))
    return os.path.dirname(folder).rstrip("/")


# Contents: whether the bytes of an image are still the same, and which images are the same bytes.

_BLOCK = 4096  # bytes
_THREADS = 16  # that wait for a slow or distant disk
_AT_ONCE = 256  # places of a thread
_CHUNK = 1 << 20


class Stored(NamedTuple):
    """Where the bytes of an image are."""

    file: str
    offset: int = 0
    size: int | None = None  # None: the whole file


class ImageSignature(NamedTuple):
    """What is known of an image without reading all of it; an image that is replaced has another."""

    size: int  # bytes, -1 where the file cannot be read
    mtime_ns: int  # of the file
    sample: int  # hash of the first, middle and last 4 KiB, 63 bits


def image_signatures(places: Sequence[Stored]) -> list[ImageSignature]:
    """Return the signature of each place.

    The sample notices an image that was replaced by one of the same size and time. It takes 31 us per file (from the system's
    cache, on one core) where size and time alone take 3: 1.4 % of reading and decoding a JPEG of 50 kB, 2.2 ms.
    """
    parts = [places[start : start + _AT_ONCE] for start in range(0, len(places), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [
            signature for found in threads.map(lambda part: [*map(image_signature, part)], parts) for signature in found
        ]


def image_signature(place: Stored) -> ImageSignature:
    """Return the signature of one place."""
    try:
        descriptor = os.open(place.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ImageSignature(-1, -1, 0)
    try:
        status = os.fstat(descriptor)
        size = status.st_size if place.size is None else place.size
        digest = blake2b(digest_size=8)
        for start in sorted({0, max(0, (size - _BLOCK) // 2), max(0, size - _BLOCK)}):
            digest.update(os.pread(descriptor, min(_BLOCK, size - start), place.offset + start))
        return ImageSignature(size, status.st_mtime_ns, int.from_bytes(digest.digest(), "little") >> 1)
    except OSError:  # a folder, or an error of the disk
        return ImageSignature(-1, -1, 0)
    finally:
        os.close(descriptor)


def equal_contents(places: Sequence[Stored]) -> list[list[int]]:
    """Return the positions of places that hold the same bytes, a list for each content that is there more than once.

    Only what is of equal size is looked at, and only what has an equal sample is read whole.
    """
    groups = [list(range(len(places)))]
    with ThreadPoolExecutor(_THREADS) as threads:
        for key in (_size, _sample, _digest):
            positions = [position for group in groups for position in group]
            found = dict(zip(positions, threads.map(key, [places[position] for position in positions]), strict=True))
            parts: defaultdict[Hashable, list[int]] = defaultdict(list)
            for number, group in enumerate(groups):
                for position in group:
                    if found[position] is not None:
                        parts[number, found[position]].append(position)
            groups = [part for part in parts.values() if len(part) > 1]
    return groups


def _size(place: Stored) -> int | None:
    try:
        return os.stat(place.file).st_size if place.size is None else place.size
    except (OSError, ValueError):
        return None


def _sample(place: Stored) -> int | None:
    signature = image_signature(place)
    return None if signature.size < 0 else signature.sample


def _digest(place: Stored) -> bytes | None:
    digest = blake2b(digest_size=16)
    try:
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.offset)
            left = os.fstat(file.fileno()).st_size if place.size is None else place.size
            while left > 0 and (data := file.read(min(_CHUNK, left))):
                digest.update(data)
                left -= len(data)
    except OSError:
        return None
    return digest.digest()
