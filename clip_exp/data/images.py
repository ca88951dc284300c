"""Pictures from files: only regular files of allowed formats and sizes are decoded, and each refusal has a reason."""

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_FILE_BYTES = 256 * 1024 * 1024
_WHITE = (255, 255, 255, 255)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, without the file's name."""


def read_image(path: str | Path, max_pixels: int) -> Tensor:
    """A picture as training sees it: RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG goes through torchvision, whose decoder gives Pillow's pixels faster; the rest, and what it refuses, through Pillow.

    Args:
        path: of a JPEG, PNG, WebP, GIF (its first frame) or BMP file.
        max_pixels: larger pictures are refused from their header, before any pixel is decoded.

    Returns: uint8 [3, H, W], in memory [H, W, 3].

    Raises: BadImage with the reason.
    """
    data = _read_file(path)
    picture = _open(data, max_pixels)
    if picture.format == "JPEG" and (image := _decode_jpeg(data)) is not None:
        return image
    return pil_to_tensor(_to_rgb(picture))


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """A picture as the published evaluation protocol sees it: decoded by Pillow, in its own mode, EXIF ignored.

    16 bits are scaled to 8, which Pillow's own conversion to RGB would clip.

    Raises: BadImage with the reason.
    """
    picture = _open(_read_file(path), max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture.load()
            return _to_eight_bits(picture)
        except Exception as error:
            raise BadImage(_reason(error)) from error


def pil_to_tensor(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read_file(path: str | Path) -> bytearray:
    """The bytes of a regular file; a pipe or a device is refused without waiting for it."""
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if not 0 < status.st_size <= MAX_FILE_BYTES:
                raise BadImage(f"{status.st_size} bytes" if status.st_size else "empty file")
            data = bytearray(status.st_size)
            view, filled = memoryview(data), 0
            while filled < len(data) and (count := file.readinto(view[filled:])):
                filled += count
            return data
    except FileNotFoundError as error:
        raise BadImage("no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(_reason(error)) from error


def _open(data: bytearray, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, looser, limit of pixels
        try:
            picture = Image.open(BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise BadImage(f"not a picture that can be read ({', '.join(FORMATS)})") from error
        except Exception as error:
            raise BadImage(_reason(error)) from error
    width, height = picture.size
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than data.max_image_pixels={max_pixels}")
    return picture


def _decode_jpeg(data: bytearray) -> Tensor | None:
    """None where torchvision does not decode this picture, or no longer has a decoder (deprecated since 0.29)."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # 0.9 s to import, and only JPEG files need it
    except ImportError:
        return None
    encoded = torch.frombuffer(data, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            return None


def _to_rgb(picture: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture.load()
            upright = _upright(_to_eight_bits(picture))
            if upright.mode in _HAS_ALPHA or "transparency" in upright.info:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, _WHITE), upright.convert("RGBA"))
            return upright.convert("RGB")
        except Exception as error:
            raise BadImage(_reason(error)) from error


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper byte, as Pillow does itself for 16-bit colour; other modes are left alone."""
    if not picture.mode.startswith("I"):
        return picture
    scaled = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    scaled.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return scaled


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return picture


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
