"""Pixels of pictures from bytes: what passes the limits is decoded, and each refusal has a reason.

No decoder is trusted: whatever it raises is a reason, its warnings are not shown, and what it needs beyond the libraries stays
below 500 MB for pictures within the default limits.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from clip_exp.data.files import DAMAGED, BadImage, ImageLimits, read_file
from clip_exp.data.headers import JPEGS, ON_THEIR_SIDE, bad_image, open_picture, orientation_of

MAX_EVALUATED_BYTES = 256 << 20
_WHITE = (255, 255, 255, 255)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_STRIP_PIXELS = 1 << 20

# From an upright picture [H, W, 3] to a view of it as it lies in the file, by EXIF orientation.
_AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def decode_rgb(data: bytearray, limits: ImageLimits) -> Tensor:
    """A picture as training sees it: RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG and WebP go through torchvision, whose decoders give Pillow's pixels faster and in less memory; the rest, and what they
    refuse, through Pillow.

    Args:
        data: the bytes of its file; of an animation the first frame counts.
        limits: larger pictures and other formats are refused from the header.

    Returns: uint8 [3, H, W], in memory [H, W, 3].

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        picture = open_picture(data, limits)
        try:
            if picture.format in JPEGS and (image := _decode_jpeg(data)) is not None:
                if sorted(image.shape[1:]) != sorted(picture.size):
                    raise BadImage(f"{DAMAGED}: its header contradicts itself")
                return image
            if picture.format == "WEBP" and (image := _decode_webp(data)) is not None:
                return _upright_rgb(_strips_of_tensor(image), picture.size, orientation_of(picture))
            picture.load()
            return _upright_rgb(_strips(picture), picture.size, orientation_of(picture))
        except Exception as error:
            raise bad_image(error) from error


def decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    """A picture as the published evaluation protocol sees it: Pillow's pixels, in its own mode, EXIF ignored.

    16 bits are scaled to 8, which Pillow's own conversion to RGB would clip.

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        picture = open_picture(data, limits)
        try:
            if picture.format == "WEBP" and (image := _decode_webp(data)) is not None:
                return Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.load()
            return _in_eight_bits(picture) if picture.mode.startswith("I") else picture
        except Exception as error:
            raise bad_image(error) from error


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """`decode` of a file.

    Raises: BadImage with the reason.
    """
    limits = ImageLimits(max_pixels, max_bytes=MAX_EVALUATED_BYTES)
    return decode(read_file(path, limits), limits)


def pil_to_tensor(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode_jpeg(data: bytearray) -> Tensor | None:
    """None where torchvision does not decode this picture, or no longer has a decoder (deprecated since 0.29)."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # 0.9 s to import, and only some files need it

        encoded = torch.frombuffer(data, dtype=torch.uint8)
        with _silent_worker():
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (ImportError, RuntimeError):
        return None


@contextmanager
def _silent_worker() -> Iterator[None]:
    """libjpeg writes its doubts to the terminal, without the file's name. Other processes have threads that write there too."""
    if get_worker_info() is None or (descriptors := _stderr_and_nothing()) is None:
        yield
        return
    stderr, nothing = descriptors
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)


@cache
def _stderr_and_nothing() -> tuple[int, int] | None:
    try:
        return os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # of a process that was started without one
        return None


def _decode_webp(data: bytearray) -> Tensor | None:
    """RGB or RGBA as stored; None likewise, as for animations."""
    try:
        from torchvision.io import ImageReadMode, decode_webp

        return decode_webp(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    except (ImportError, RuntimeError):
        return None


Strips = Iterator[tuple[int, Image.Image]]  # first row of each, in order


def _strips(picture: Image.Image) -> Strips:
    """A picture in pieces: conversions make copies of what they are given."""
    rows = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _strips_of_tensor(image_CHW: Tensor) -> Strips:
    image_HWC = image_CHW.permute(1, 2, 0).numpy()
    rows = max(1, _STRIP_PIXELS // image_HWC.shape[1])
    for top in range(0, len(image_HWC), rows):
        yield top, Image.fromarray(image_HWC[top : top + rows])


def _upright_rgb(strips: Strips, size: tuple[int, int], orientation: int) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of a picture whose stored width and height are `size`."""
    width, height = size if orientation in ON_THEIR_SIDE else size[::-1]
    upright = np.empty((width, height, 3), dtype=np.uint8)
    stored = _AS_STORED[orientation](upright) if orientation in _AS_STORED else upright
    for top, strip in strips:
        stored[top : top + strip.height] = np.asarray(_to_rgb(strip))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return Image.fromarray(_upper_byte(picture)).convert("RGB")
    if picture.mode in _HAS_ALPHA or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture.convert("RGBA"))
    return picture.convert("RGB")


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    pixels = np.empty((picture.height, picture.width), dtype=np.uint8)
    for top, strip in _strips(picture):
        pixels[top : top + strip.height] = _upper_byte(strip)
    scaled = Image.fromarray(pixels)
    scaled.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return scaled


def _upper_byte(picture: Image.Image) -> np.ndarray:
    """uint8 of 16-bit grey, as Pillow itself does for 16-bit color."""
    return (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
