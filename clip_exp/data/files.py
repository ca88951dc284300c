"""The bytes of a picture, from a file or a member of a shard: only what may be read, and each refusal has a reason. No torch.

A reason is one of the kinds below, and mostly a colon and what is known beyond that: `too many bytes: 70000000, more than
max_image_bytes=67108864`. Bad pictures are counted by kind (`kind_of`).
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from clip_exp.config.data_schema import DataConfig

NO_SUCH_FILE = "no such file"  # a link that leads nowhere included
NOT_A_FILE = "not a regular file"  # a folder, a pipe, a device, a socket
CANNOT_OPEN = "cannot be opened"  # permissions, a name that no file can have, an error of the disk
OUTSIDE_ROOT = "outside the data root"
EMPTY_FILE = "empty file"
TOO_MANY_BYTES = "too many bytes"
TOO_MANY_PIXELS = "too many pixels"
TOO_LONG = "too long a strip"  # for a decoder, or for evaluation, whose resizing would make it longer still
NOT_A_PICTURE = "not a picture"
NOT_ALLOWED = "format not allowed"
TRUNCATED = "truncated"
DAMAGED = "damaged"
OUT_OF_MEMORY = "out of memory"
KINDS = (
    NO_SUCH_FILE, NOT_A_FILE, CANNOT_OPEN, OUTSIDE_ROOT, EMPTY_FILE, TOO_MANY_BYTES,
    TOO_MANY_PIXELS, TOO_LONG, NOT_A_PICTURE, NOT_ALLOWED, TRUNCATED, DAMAGED, OUT_OF_MEMORY,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_UNLIKE_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageLimits:
    """What pictures may be.

    Attributes:
        max_pixels: width times height; judged from the header, before any pixel is decoded.
        max_bytes: of the file; judged before it is read.
        formats: Pillow's names.
        outside_root: whether a relative path of a table may leave its root by `..`.
    """

    max_pixels: int = 40_000_000
    max_bytes: int = 64 << 20
    formats: tuple[str, ...] = FORMATS
    outside_root: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> "ImageLimits":
        return cls(
            config.max_image_pixels, config.max_image_bytes, tuple(config.image_formats), config.allow_outside_root
        )


def read_file(path: str | Path, limits: ImageLimits) -> bytearray:
    """Return the bytes of a regular file; a pipe or a device is refused without waiting for it. Links are followed.

    Every image that a command opens by its path is read here: no message has a byte of the file.

    Raises: BadImage with the reason.
    """
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


def read_below(root: Path, path: str, limits: ImageLimits) -> bytearray:
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


def kind_of(reason: str) -> str:
    """The kind of fault that a reason begins with: `truncated` of `truncated: 12 of 90 bytes`."""
    return reason.partition(":")[0]


def reason_of(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


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
