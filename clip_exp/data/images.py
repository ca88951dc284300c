"""Pictures from bytes: only allowed formats and sizes are decoded, and each refusal has a reason."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clip_exp.data.files import BadImage, ImageLimits, read_file, reason_of

MAX_EVALUATED_BYTES = 256 << 20
_WHITE = (255, 255, 255, 255)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def decode_rgb(data: bytearray, limits: ImageLimits) -> Tensor:
    """A picture as training sees it: RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG goes through torchvision, whose decoder gives Pillow's pixels faster; the rest, and what it refuses, through Pillow.

    Args:
        data: the bytes of its file; of an animation the first frame counts.
        limits: larger pictures and other formats are refused from the header.

    Returns: uint8 [3, H, W], in memory [H, W, 3].

    Raises: BadImage with the reason.
    """
    picture = _open(data, limits)
    if picture.format == "JPEG" and (image := _decode_jpeg(data)) is not None:
        return image
    return pil_to_tensor(_to_rgb(picture))


def decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    """A picture as the published evaluation protocol sees it: decoded by Pillow, in its own mode, EXIF ignored.

    16 bits are scaled to 8, which Pillow's own conversion to RGB would clip.

    Raises: BadImage with the reason.
    """
    picture = _open(data, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture.load()
            return _to_eight_bits(picture)
        except Exception as error:
            raise BadImage(reason_of(error)) from error


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """`decode` of a file.

    Raises: BadImage with the reason.
    """
    limits = ImageLimits(max_pixels, max_bytes=MAX_EVALUATED_BYTES)
    return decode(read_file(path, limits), limits)


def pil_to_tensor(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _open(data: bytearray, limits: ImageLimits) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, looser, limit of pixels
        try:
            picture = Image.open(BytesIO(data), formats=limits.formats)
        except Image.UnidentifiedImageError as error:
            raise BadImage(f"not a picture that can be read ({', '.join(limits.formats)})") from error
        except Exception as error:
            raise BadImage(reason_of(error)) from error
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than max_image_pixels={limits.max_pixels}")
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
            raise BadImage(reason_of(error)) from error


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
