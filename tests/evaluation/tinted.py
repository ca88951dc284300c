"""Features and images that depend on their class, for classifiers that learn."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_exp.inference.pipeline import Pipeline

CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox")


def blobs(classes: int, each: int, noise: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit vectors around a center per class, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(classes).repeat(each)[torch.randperm(classes * each, generator=generator)]
    features = centres[labels] + noise * torch.randn(len(labels), 16, generator=generator)
    return torch.nn.functional.normalize(features, dim=1), labels


def tinted(root: Path, each: int, first: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write a folder per class with noise images around a color of the class, which are often classified correctly."""
    for name in classes:
        position = CLASSES.index(name)
        colour = np.random.default_rng(1000 + position).integers(60, 196, 3)
        for number in range(first, first + each):
            draw = np.random.default_rng(100 * position + number)
            pixels = colour + draw.normal(0, 35, 3) + draw.integers(-40, 40, (36, 40, 3))
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def direct(clip: Pipeline, root: Path) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted(root.glob("*/*.png"))
    return clip.encode_image(paths).double().numpy(), np.array([path.parent.name for path in paths])
