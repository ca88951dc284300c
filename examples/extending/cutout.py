"""A transform of training images: a random crop in which a random square is gray (Cutout; DeVries and Taylor 2017).

python train.py --config-dir examples/extending/conf data/transform=cutout data=digits model=vit_tiny
"""

import torch
from torch import Tensor
from torchvision.transforms import v2


class Cutout:
    """Random resized crop with a gray square.

    Random numbers may come from torch, NumPy or Python: clip_exp seeds them for each sample.

    Args:
        size: side of the result, pixels.
        hole: side of the square, pixels.
    """

    def __init__(self, size: int, hole: int = 16) -> None:
        self.crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
        self.size, self.hole = size, hole

    def __call__(self, image_CHW: Tensor) -> Tensor:
        """Return a uint8 image [3, size, size] for a uint8 image [3, H, W]."""
        cropped = self.crop(image_CHW).clone()
        top, left = (int(x) for x in torch.randint(0, self.size - self.hole + 1, (2,)))
        cropped[:, top : top + self.hole, left : left + self.hole] = 128
        return cropped
