"""The bytes of a picture, from a file or a member of a shard: only what may be read, and each refusal has a reason. No torch."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from clip_exp.config.schema import DataConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageLimits:
    """What pictures may be.

    Attributes:
        max_pixels: width times height; judged from the header, before any pixel is decoded.
        max_bytes: of the file; judged before it is read.
        formats: Pillow's names.
        outside_root: whether a picture may lie outside its table's root.
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


def read_file(path: str | Path, limits: ImageLimits, root: Path | None = None) -> bytearray:
    """The bytes of a regular file; a pipe or a device is refused without waiting for it.

    Args:
        root: the folder that the file must lie in once links are followed, unless the limits allow others; None: anywhere.

    Raises: BadImage with the reason.
    """
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if not 0 < status.st_size <= limits.max_bytes:
                raise BadImage(f"{status.st_size} bytes" if status.st_size else "empty file")
            data = bytearray(status.st_size)
            view, filled = memoryview(data), 0
            while filled < len(data) and (count := file.readinto(view[filled:])):
                filled += count
            return data
    except FileNotFoundError as error:
        raise BadImage("no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(reason_of(error)) from error


def read_member(shard: Path, offset: int, size: int, limits: ImageLimits) -> bytearray:
    """The bytes of a member of a shard.

    Raises: BadImage with the reason.
    """
    if not 0 < size <= limits.max_bytes:
        raise BadImage(f"{size} bytes" if size else "empty file")
    try:
        with open(shard, "rb", buffering=0) as file:
            data = bytearray(os.pread(file.fileno(), size, offset))
    except OSError as error:
        raise BadImage(reason_of(error)) from error
    if len(data) < size:
        raise BadImage("the shard ends inside it")
    return data


def reason_of(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
