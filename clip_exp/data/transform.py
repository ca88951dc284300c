"""The user's own transform of training images, named by `data.transform._target_`, instead of the random crop and augmentation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_exp.config.base import Target
from clip_exp.config.targets import failure, instantiate
from clip_exp.data.images import pil_to_tensor
from clip_exp.data.randomness import hash64, seeded
from clip_exp.errors import ConfigError, SampleError

KEY = "data.transform"
# First integer of a random key, so that different uses of one seed are independent.
_TRANSFORM = 13


@dataclass(frozen=True)
class CustomTransform:
    """Transform of a decoded image. The generators of Python, NumPy and torch are seeded for each sample.

    Attributes:
        function: the user's transform, from a uint8 image [3, H, W] to a uint8 image [3, size, size] or a PIL image.
        target: its name, for messages.
        size: side of the result, pixels.
    """

    function: Callable[[Tensor], Any]
    target: str
    size: int

    def __call__(self, image_CHW: Tensor, *key: int) -> Tensor:
        """Transform an image; equal keys, such as (seed, epoch, row), give equal random numbers.

        Raises: SampleError if the transform fails or returns something else.
        """
        with seeded(hash64(_TRANSFORM, *key)):
            try:
                result = self.function(image_CHW)
            except Exception as error:
                raise SampleError(f"{KEY}._target_={self.target} failed: {failure(error)}") from error
        if isinstance(result, Image.Image):
            result = pil_to_tensor(result.convert("RGB"))
        expected = (3, self.size, self.size)
        if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.shape != expected:
            what = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise SampleError(
                f"{KEY}._target_={self.target} returned {what}, but a uint8 tensor {list(expected)} is required (model.image.image_size="
                f"{self.size}). Leave normalization out: it happens on the device."
            )
        return result.as_subclass(Tensor)


def build_transform(config: Target | None, size: int) -> CustomTransform | None:
    """Create the transform of a configuration, and try it on an image; return None if there is none.

    Raises:
        ConfigError: the transform cannot be created, or does not return images of the right shape.
    """
    if config is None:
        return None
    function = instantiate(config, KEY)
    if not callable(function):
        raise ConfigError(
            f"{KEY}._target_={config.target} is not callable: name a class with __call__, or set _partial_=true."
        )
    transform = CustomTransform(function, config.target, size)
    try:
        transform(torch.full((3, size + 32, 2 * size), 128, dtype=torch.uint8), 0)
    except SampleError as error:
        raise ConfigError(str(error)) from error
    return transform
