"""From a decoded picture to the model's input: random crops for training, the published protocol for evaluation.

Pictures stay uint8 until they are on the device; `normalize` makes them float there.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from clip_exp.config.data_schema import AugmentationConfig
from clip_exp.config.model_schema import ImageTowerConfig, Interpolation, ResizeMode
from clip_exp.data.colors import change_colors, happens
from clip_exp.data.files import TOO_LONG, BadImage
from clip_exp.data.images import pil_to_tensor
from clip_exp.data.randomness import Draws

MAX_ASPECT = 200
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESAMPLING = {Interpolation.bicubic: Image.Resampling.BICUBIC, Interpolation.bilinear: Image.Resampling.BILINEAR}


class Preprocessing(NamedTuple):
    """What an image tower expects of a picture."""

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


def crop_box(
    height: int, width: int, draws: Draws, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width), drawn as torchvision's RandomResizedCrop does (Szegedy et al. 2014).

    Args:
        height, width: of the picture, pixels.
        draws: where the random numbers come from.
        scale: smallest and largest area of the crop over the picture's.
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


def train_transform(
    image_CHW: Tensor,
    size: int,
    draws: Draws,
    augmentation: AugmentationConfig,
) -> Tensor:
    """A random crop of a picture, resized (bicubic, antialiased, within 2 levels of Pillow), and what else is drawn.

    Crop, flip, color jitter, grey and blur are drawn and applied in this order, each only where it is switched on: crops do not
    change with what comes after them. All but the crop see the resized picture.

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


def check_strip(width: int, height: int, resize_mode: ResizeMode) -> None:
    """What `eval_transform` asks of a picture's size, pixels.

    Raises: BadImage for a strip whose resized long side would not fit in memory.
    """
    if resize_mode is ResizeMode.shortest and max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{TOO_LONG}: {width} x {height} pixels, more than {MAX_ASPECT} times its shorter side")


def eval_transform(
    picture: Image.Image,
    size: int,
    interpolation: Interpolation = Interpolation.bicubic,
    resize_mode: ResizeMode = ResizeMode.shortest,
) -> Tensor:
    """The protocol of the published CLIP numbers: shorter side to `size` (Pillow, bicubic), center crop, then RGB.

    Under `squash` both sides become `size`, as SigLIP's numbers were measured.

    Its order is kept, so palette pictures are resized by nearest neighbor and transparency is dropped, as there.

    Returns: uint8 [3, size, size], contiguous.

    Raises: BadImage for a strip whose resized long side would not fit in memory.
    """
    if resize_mode is ResizeMode.squash:
        return pil_to_tensor(picture.resize((size, size), RESAMPLING[interpolation]).convert("RGB")).contiguous()
    width, height = picture.size
    shorter = min(width, height)
    check_strip(width, height, resize_mode)
    target = (int(size * width / shorter), int(size * height / shorter))
    if picture.size != target:
        picture = picture.resize(target, RESAMPLING[interpolation])
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return pil_to_tensor(picture.crop((left, top, left + size, top + size)).convert("RGB")).contiguous()


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
