"""Decoding and preprocessing of images, from the bytes of a file to the input of a model.

    training:     to_rgb (decode_rgb) -> train_transform (random crop, augmentation)
    evaluation:   to_pil (decode) -> eval_transform (resize and center crop, as in published evaluations)
    both:         normalize, on the device

Images stay uint8 until they are on the device. Copying uint8 moves a quarter of the bytes of float32.

Files are untrusted. The limits are checked in the header before any pixel is decoded. Any exception of a decoder
becomes a `BadImage` with a reason, and its warnings are suppressed. For images within the default limits, decoding
needs less than 500 MB, and slightly more for an AVIF with alpha and full color resolution.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from clip_exp.config.data import AugmentationConfig
from clip_exp.config.model import ImageTowerConfig, Interpolation, ResizeMode
from clip_exp.data import decoders
from clip_exp.data.files import (
    DAMAGED,
    JPEGS,
    SIDEWAYS,
    TOO_LONG,
    BadImage,
    ImageLimits,
    bad_image,
    open_image_bytes,
    orientation_of,
    read_file,
)
from clip_exp.data.pairs import RawImage
from clip_exp.data.randomness import Draws

_WHITE = (255, 255, 255, 255)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_STRIP_PIXELS = 1 << 20

# Maps an upright image [H, W, 3] to a view with the orientation in the file, by EXIF orientation.
_AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def to_rgb(image: RawImage, limits: ImageLimits) -> Tensor:
    """Return a source's image for training; see `decode_rgb`.

    Raises: BadImage with the reason.
    """
    if isinstance(image, bytearray):
        return decode_rgb(image, limits)
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    with _without_warnings():
        try:
            _load(image)
            return _upright_rgb(_strips(image), image.size, orientation_of(image))
        except Exception as error:
            raise bad_image(error) from error


def to_pil(image: RawImage, limits: ImageLimits) -> Image.Image:
    """Return a source's image for evaluation; see `decode`.

    Raises: BadImage with the reason.
    """
    if isinstance(image, bytearray):
        return decode(image, limits)
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with _without_warnings():
        try:
            return _in_8_bits(image)
        except Exception as error:
            raise bad_image(error) from error


def decode_rgb(data: bytearray, limits: ImageLimits) -> Tensor:
    """Decode an image for training: RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG and WebP are decoded by torchcodec, which returns the same pixels as Pillow, faster and with less memory.
    Other formats, and files that torchcodec refuses, are decoded by Pillow.

    Args:
        data: content of the image file. The first frame of an animation is used.
        limits: allowed sizes and formats, checked in the header.

    Returns: uint8 [3, H, W], stored as [H, W, 3].

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        image = open_image_bytes(data, limits)
        try:
            if image.format in JPEGS and _exif_is_first(image) and (pixels := decoders.decode_jpeg(data)) is not None:
                _check_shape(pixels, image)
                return pixels
            if _is_still_webp(image) and (pixels := decoders.decode_webp(data)) is not None:
                _check_shape(pixels, image)
                return _upright_rgb(_strips_of_tensor(pixels), (pixels.shape[2], pixels.shape[1]))
            _load(image)
            return _upright_rgb(_strips(image), image.size, orientation_of(image))
        except Exception as error:
            raise bad_image(error) from error


def decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    """Decode an image for evaluation: Pillow's pixels in the mode of the file, EXIF ignored.

    16 bits are scaled to 8, because Pillow's conversion to RGB would clip them.

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        image = open_image_bytes(data, limits)
        try:
            if _is_still_webp(image) and (pixels := decoders.decode_webp(data)) is not None:
                _check_shape(pixels, image)
                return Image.fromarray(_as_stored(pixels.permute(1, 2, 0).numpy(), orientation_of(image)))
            return _in_8_bits(image)
        except Exception as error:
            raise bad_image(error) from error


def open_image(path: str | Path, limits: ImageLimits) -> Image.Image:
    """Read and `decode` an image file.

    Raises: BadImage with the reason.
    """
    return decode(read_file(path, limits), limits)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3, H, W], stored as [H, W, 3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _check_shape(pixels_CHW: Tensor, image: Image.Image) -> None:
    if sorted(pixels_CHW.shape[1:]) != sorted(image.size):
        raise BadImage(f"{DAMAGED}: the header contradicts itself")


def _exif_is_first(image: Image.Image) -> bool:
    """Return True for a JPEG without EXIF, or with EXIF in its first APP1 segment, the only one where torchcodec looks."""
    first = next((body for name, body in getattr(image, "applist", ()) if name == "APP1"), b"")
    return first.startswith(b"Exif") or "exif" not in image.info


def _is_still_webp(image: Image.Image) -> bool:
    return image.format == "WEBP" and not getattr(image, "is_animated", False)  # torchcodec decodes all frames


def _load(image: Image.Image) -> None:
    """Decode the pixels, whose number was checked in the header."""
    size = image.size
    with decoders.silent_worker():
        image.load()
    if sorted(image.size) != sorted(size):  # a HEIF has its size in the container and in the encoded image
        raise BadImage(f"{DAMAGED}: the header contradicts itself")


def _in_8_bits(image: Image.Image) -> Image.Image:
    _load(image)
    if not image.mode.startswith("I"):
        return image
    scaled_HW = np.empty((image.height, image.width), dtype=np.uint8)
    for top, strip in _strips(image):
        scaled_HW[top : top + strip.height] = _upper_byte(strip)
    scaled = Image.fromarray(scaled_HW)
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return scaled


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Strips = Iterator[tuple[int, Image.Image]]  # (first row, strip) in order


def _strips(image: Image.Image) -> Strips:
    """Yield horizontal strips of an image.

    Converting them one by one limits the memory for the copies that Pillow makes.
    """
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strips_of_tensor(image_CHW: Tensor) -> Strips:
    image_HWC = image_CHW.permute(1, 2, 0).numpy()
    rows = max(1, _STRIP_PIXELS // image_HWC.shape[1])
    for top in range(0, len(image_HWC), rows):
        yield top, Image.fromarray(image_HWC[top : top + rows])


def _upright_rgb(strips: Strips, size: tuple[int, int], orientation: int = 1) -> Tensor:
    """Assemble strips to an upright RGB image.

    Args:
        size: width and height as stored in the file.
        orientation: EXIF orientation.

    Returns: uint8 [3, H, W], stored as [H, W, 3].
    """
    width, height = size if orientation in SIDEWAYS else size[::-1]
    upright = np.empty((width, height, 3), dtype=np.uint8)
    stored = _as_stored(upright, orientation)
    for top, strip in strips:
        if strip.mode.startswith("I"):
            strip = Image.fromarray(_upper_byte(strip))
        elif strip.mode in _HAS_ALPHA or "transparency" in strip.info:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, _WHITE), strip.convert("RGBA"))
        stored[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _as_stored(upright_HWC: np.ndarray, orientation: int) -> np.ndarray:
    return _AS_STORED[orientation](upright_HWC) if orientation in _AS_STORED else upright_HWC


def _upper_byte(image: Image.Image) -> np.ndarray:
    """Convert 16-bit gray to uint8 by the upper byte, as Pillow does for 16-bit color."""
    return (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


# Transforms to the input size of the model.

MAX_ASPECT = 200
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESAMPLING = {Interpolation.bicubic: Image.Resampling.BICUBIC, Interpolation.bilinear: Image.Resampling.BILINEAR}


class Preprocessing(NamedTuple):
    """Input size and normalization of an image tower."""

    size: int  # side, pixels
    mean: list[float]  # per channel, of RGB values in 0..1
    std: list[float]
    interpolation: Interpolation
    resize_mode: ResizeMode


def preprocessing_of(tower: ImageTowerConfig) -> Preprocessing:
    """Return the preprocessing of a tower, with OpenAI's values for those that are not set."""
    return Preprocessing(
        tower.image_size,
        tower.mean or OPENAI_MEAN,
        tower.std or OPENAI_STD,
        tower.interpolation or Interpolation.bicubic,
        tower.resize_mode or ResizeMode.shortest,
    )


def train_transform(
    image_CHW: Tensor,
    size: int,
    draws: Draws,
    augmentation: AugmentationConfig,
) -> Tensor:
    """Apply a random resized crop (bicubic, antialiased, within 2 levels of Pillow) and the other augmentations.

    Crop, flip, color jitter, grayscale and blur are drawn and applied in this order, each only if it is enabled. The
    crop is drawn first, so it does not change when other augmentations are enabled. All augmentations but the crop see
    the resized image.

    Args:
        image_CHW: uint8 [3, H, W].
        size: side of the result, pixels.
        draws: source of the random numbers; equal draws give equal pixels.
        augmentation: probabilities and strengths.

    Returns: uint8 [3, size, size], stored as [size, size, 3]. `normalize` converts to channels first on the device.
    """
    top, left, height, width = crop_box(
        image_CHW.shape[1], image_CHW.shape[2], draws, augmentation.scale, augmentation.ratio
    )
    crop = image_CHW[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    resized = interpolate(crop, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    if happens(augmentation.horizontal_flip, draws):
        resized = resized.flip(-1)
    return change_colors(resized, draws, augmentation)


def crop_box(
    height: int, width: int, draws: Draws, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draw a random crop (top, left, height, width) as torchvision's RandomResizedCrop (Szegedy et al. 2014).

    Args:
        height, width: size of the image, pixels.
        draws: source of the random numbers.
        scale: smallest and largest area of the crop, as a fraction of the image.
        ratio: smallest and largest aspect ratio of the crop (width over height).
    """
    log_ratio = [math.log(bound) for bound in ratio]
    for _ in range(10):
        area = height * width * draws.uniform(scale[0], scale[1])
        aspect = math.exp(draws.uniform(log_ratio[0], log_ratio[1]))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = draws.integer(height - crop_height + 1), draws.integer(width - crop_width + 1)
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def happens(probability: float, draws: Draws) -> bool:
    """Return True with a probability. With probability 0, no random number is drawn."""
    return probability > 0 and draws.uniform() < probability


def change_colors(image_CHW: Tensor, draws: Draws, augmentation: AugmentationConfig) -> Tensor:
    """Apply color jitter, grayscale and Gaussian blur, in this order, each with its probability.

    Args:
        image_CHW: uint8 [3, H, W].

    Returns: uint8 [3, H, W].
    """
    if augmentation.color_jitter is not None and happens(augmentation.color_jitter_prob, draws):
        image_CHW = jitter(image_CHW, augmentation.color_jitter, draws)
    if happens(augmentation.gray_scale_prob, draws):
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        image_CHW = rgb_to_grayscale(image_CHW, num_output_channels=3)
    if happens(augmentation.gaussian_blur_prob, draws):
        from torchvision.transforms.v2.functional import gaussian_blur

        sigma = draws.uniform(*augmentation.gaussian_blur_sigma)
        image_CHW = gaussian_blur(image_CHW, [blur_kernel(image_CHW.shape[-1])] * 2, [sigma] * 2)
    return image_CHW


def jitter(image_CHW: Tensor, strengths: Sequence[float], draws: Draws) -> Tensor:
    """Change brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter.

    The first three are multiplied by a factor from [max(0, 1 - strength), 1 + strength]. The hue is rotated by
    [-strength, strength] of a full circle. The order is drawn first, then the four factors.

    Args:
        image_CHW: uint8 [3, H, W].
        strengths: strengths of brightness, contrast, saturation and hue.
    """
    # Imported here, because it takes 0.9 s and few runs need it.
    from torchvision.transforms.v2 import functional as F

    changes: list[Callable[[Tensor, float], Tensor]]
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    order = list(range(len(changes)))
    for last in range(len(changes) - 1, 0, -1):  # Fisher-Yates shuffle
        other = draws.integer(last + 1)
        order[last], order[other] = order[other], order[last]
    factors = [draws.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths[:3]]
    factors.append(draws.uniform(-strengths[3], strengths[3]))
    for which in order:
        if strengths[which] > 0:
            image_CHW = changes[which](image_CHW, factors[which])
    return image_CHW


def blur_kernel(size: int) -> int:
    """Return the side of the blur kernel in pixels, odd and about a tenth of the image's (Chen et al. 2020, SimCLR)."""
    return 2 * max(1, size // 20) + 1


def check_strip(width: int, height: int, resize_mode: ResizeMode) -> None:
    """Check that `eval_transform` can resize an image of this size in pixels.

    Raises: BadImage for a strip whose resized long side would not fit in memory.
    """
    if resize_mode is ResizeMode.shortest and max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(
            f"{TOO_LONG}: {width} x {height} pixels, the longer side is more than {MAX_ASPECT} times the shorter"
        )


def eval_transform(
    image: Image.Image,
    size: int,
    interpolation: Interpolation = Interpolation.bicubic,
    resize_mode: ResizeMode = ResizeMode.shortest,
) -> Tensor:
    """Resize the shorter side (Pillow, bicubic), crop the center and convert to RGB, as published CLIP evaluations do.

    With `squash`, both sides are resized to `size`, as in the published SigLIP evaluations.

    Conversion to RGB comes last, as in the published code. So palette images are resized by nearest neighbor, and
    transparency is dropped.

    Returns: uint8 [3, size, size], contiguous.

    Raises: BadImage for a strip whose resized long side would not fit in memory.
    """
    if resize_mode is ResizeMode.squash:
        return pil_to_tensor(image.resize((size, size), RESAMPLING[interpolation]).convert("RGB")).contiguous()
    width, height = image.size
    shorter = min(width, height)
    check_strip(width, height, resize_mode)
    target = (int(size * width / shorter), int(size * height / shorter))
    if image.size != target:
        image = image.resize(target, RESAMPLING[interpolation])
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return pil_to_tensor(image.crop((left, top, left + size, top + size)).convert("RGB")).contiguous()


def normalize(image_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 pixels to normalized float32 [B, 3, H, W], contiguous.

    The result is bit-equal to torchvision's ToTensor and Normalize.

    Args:
        image_BCHW: uint8 [B, 3, H, W], on any device, in any memory format.
        mean, std: per channel, of RGB values in 0..1.
    """
    mean_C11, std_C11 = per_channel(tuple(mean), image_BCHW.device), per_channel(tuple(std), image_BCHW.device)
    image_BCHW = image_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
    return image_BCHW.div_(255).sub_(mean_C11).div_(std_C11)


# Cached, because copying the values to a GPU would synchronize every batch with the work that is queued there.
@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 [C, 1, 1] on `device`, cached per process."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
