"""From the bytes of an image to the model's input: decoding, random crops for training, the published protocol for evaluation.

What passes the limits is decoded, and each refusal has a reason. No decoder is trusted: whatever it raises is a reason, its
warnings are not shown, and what it needs beyond the libraries stays below 500 MB for images within the default limits.

Images stay uint8 until they are on the device; `normalize` makes them float there.
"""

import math
import os
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
from torch.utils.data import get_worker_info

from clip_exp.config.data import AugmentationConfig
from clip_exp.config.model import ImageTowerConfig, Interpolation, ResizeMode
from clip_exp.data.files import (
    DAMAGED,
    JPEGS,
    MAX_EVALUATED_BYTES,
    ON_THEIR_SIDE,
    TOO_LONG,
    BadImage,
    ImageLimits,
    bad_image,
    open_image_bytes,
    orientation_of,
    read_file,
)
from clip_exp.data.randomness import Draws

_WHITE = (255, 255, 255, 255)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_STRIP_PIXELS = 1 << 20

# From an upright image [H, W, 3] to a view of it as it lies in the file, by EXIF orientation.
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
    """An image as training sees it: RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG and WebP go through torchvision, whose decoders give Pillow's pixels faster and in less memory; the rest, and what they
    refuse, through Pillow.

    Args:
        data: the bytes of its file; of an animation the first frame counts.
        limits: larger images and other formats are refused from the header.

    Returns: uint8 [3, H, W], in memory [H, W, 3].

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        image = open_image_bytes(data, limits)
        try:
            if image.format in JPEGS and (pixels := _decode_jpeg(data)) is not None:
                if sorted(pixels.shape[1:]) != sorted(image.size):
                    raise BadImage(f"{DAMAGED}: its header contradicts itself")
                return pixels
            if image.format == "WEBP" and (pixels := _decode_webp(data)) is not None:
                return _upright_rgb(_strips_of_tensor(pixels), image.size, orientation_of(image))
            image.load()
            return _upright_rgb(_strips(image), image.size, orientation_of(image))
        except Exception as error:
            raise bad_image(error) from error


def decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    """An image as the published evaluation protocol sees it: Pillow's pixels, in its own mode, EXIF ignored.

    16 bits are scaled to 8, which Pillow's own conversion to RGB would clip.

    Raises: BadImage with the reason.
    """
    with _without_warnings():
        image = open_image_bytes(data, limits)
        try:
            if image.format == "WEBP" and (pixels := _decode_webp(data)) is not None:
                return Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.load()
            if not image.mode.startswith("I"):
                return image
            scaled_HW = np.empty((image.height, image.width), dtype=np.uint8)
            for top, strip in _strips(image):
                scaled_HW[top : top + strip.height] = _upper_byte(strip)
            scaled = Image.fromarray(scaled_HW)
            scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
            return scaled
        except Exception as error:
            raise bad_image(error) from error


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """`decode` of a file.

    Raises: BadImage with the reason.
    """
    limits = ImageLimits(max_pixels, max_bytes=MAX_EVALUATED_BYTES)
    return decode(read_file(path, limits), limits)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode_jpeg(data: bytearray) -> Tensor | None:
    """None where torchvision does not decode this image, or no longer has a decoder (deprecated since 0.29)."""
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


def _strips(image: Image.Image) -> Strips:
    """An image in pieces: conversions make copies of what they are given."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strips_of_tensor(image_CHW: Tensor) -> Strips:
    image_HWC = image_CHW.permute(1, 2, 0).numpy()
    rows = max(1, _STRIP_PIXELS // image_HWC.shape[1])
    for top in range(0, len(image_HWC), rows):
        yield top, Image.fromarray(image_HWC[top : top + rows])


def _upright_rgb(strips: Strips, size: tuple[int, int], orientation: int) -> Tensor:
    """uint8 [3, H, W], in memory [H, W, 3], of an image whose stored width and height are `size`."""
    width, height = size if orientation in ON_THEIR_SIDE else size[::-1]
    upright = np.empty((width, height, 3), dtype=np.uint8)
    stored = _AS_STORED[orientation](upright) if orientation in _AS_STORED else upright
    for top, strip in strips:
        if strip.mode.startswith("I"):
            strip = Image.fromarray(_upper_byte(strip))
        elif strip.mode in _HAS_ALPHA or "transparency" in strip.info:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, _WHITE), strip.convert("RGBA"))
        stored[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _upper_byte(image: Image.Image) -> np.ndarray:
    """uint8 of 16-bit grey, as Pillow itself does for 16-bit color."""
    return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)


# Transforms: to the size that the model expects.

MAX_ASPECT = 200
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESAMPLING = {Interpolation.bicubic: Image.Resampling.BICUBIC, Interpolation.bilinear: Image.Resampling.BILINEAR}


class Preprocessing(NamedTuple):
    """What an image tower expects of an image."""

    size: int  # side, pixels
    mean: list[float]  # of RGB in 0..1
    std: list[float]
    interpolation: Interpolation
    resize_mode: ResizeMode


def preprocessing_of(tower: ImageTowerConfig) -> Preprocessing:
    """The tower's, by OpenAI's values where it says nothing."""
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
    """A random crop of an image, resized (bicubic, antialiased, within 2 levels of Pillow), and what else is drawn.

    Crop, flip, color jitter, grey and blur are drawn and applied in this order, each only where it is switched on: crops do not
    change with what comes after them. All but the crop see the resized image.

    Args:
        image_CHW: uint8 [3, H, W].
        size: side of the result, pixels.
        draws: where the random numbers come from; the same draws give the same pixels.
        augmentation: what is drawn.

    Returns: uint8 [3, size, size], in memory [size, size, 3]: putting the colors apart is left to the device (`normalize`).
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
    """A random crop (top, left, height, width), drawn as torchvision's RandomResizedCrop does (Szegedy et al. 2014).

    Args:
        height, width: of the image, pixels.
        draws: where the random numbers come from.
        scale: smallest and largest area of the crop over the image's.
        ratio: smallest and largest width over height of the crop.
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
    """Nothing is drawn for what is switched off."""
    return probability > 0 and draws.uniform() < probability


def change_colors(image_CHW: Tensor, draws: Draws, augmentation: AugmentationConfig) -> Tensor:
    """Color jitter, grey and Gaussian blur, in this order.

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
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter.

    The first three are multiplied by a factor from [max(0, 1 - strength), 1 + strength]; the hue is turned by [-strength,
    strength] of a full circle. First the order is drawn, then the four factors.

    Args:
        image_CHW: uint8 [3, H, W].
        strengths: of the four.
    """
    from torchvision.transforms.v2 import functional as F  # 0.9 s to import, and few runs need it

    changes: list[Callable[[Tensor, float], Tensor]]
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    order = list(range(len(changes)))
    for last in range(len(changes) - 1, 0, -1):  # Fisher and Yates
        other = draws.integer(last + 1)
        order[last], order[other] = order[other], order[last]
    factors = [draws.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths[:3]]
    factors.append(draws.uniform(-strengths[3], strengths[3]))
    for which in order:
        if strengths[which] > 0:
            image_CHW = changes[which](image_CHW, factors[which])
    return image_CHW


def blur_kernel(size: int) -> int:
    """Side of the kernel, pixels: a tenth of the image's, odd (SimCLR; Chen et al. 2020, appendix A)."""
    return 2 * max(1, size // 20) + 1


def check_strip(width: int, height: int, resize_mode: ResizeMode) -> None:
    """What `eval_transform` asks of an image's size, pixels.

    Raises: BadImage for a strip whose resized long side would not fit in memory.
    """
    if resize_mode is ResizeMode.shortest and max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{TOO_LONG}: {width} x {height} pixels, more than {MAX_ASPECT} times its shorter side")


def eval_transform(
    image: Image.Image,
    size: int,
    interpolation: Interpolation = Interpolation.bicubic,
    resize_mode: ResizeMode = ResizeMode.shortest,
) -> Tensor:
    """The protocol of the published CLIP numbers: shorter side to `size` (Pillow, bicubic), center crop, then RGB.

    Under `squash` both sides become `size`, as SigLIP's numbers were measured.

    Its order is kept, so palette images are resized by nearest neighbor and transparency is dropped, as there.

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
    """float32 [B, 3, H, W], contiguous, of uint8 pixels: bit-equal to torchvision's ToTensor and Normalize.

    Args:
        image_BCHW: uint8, on any device, however it lies in memory.
        mean, std: of RGB values in 0..1.
    """
    mean_C11, std_C11 = per_channel(tuple(mean), image_BCHW.device), per_channel(tuple(std), image_BCHW.device)
    image_BCHW = image_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
    return image_BCHW.div_(255).sub_(mean_C11).div_(std_C11)


@cache  # copying them to a GPU would make every batch wait for all that the GPU still has to do
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 [C, 1, 1] on `device`; made once in a process."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
