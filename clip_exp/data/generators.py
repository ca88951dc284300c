"""What generated data sets hold: scikit-learn's handwritten digits, and drawn scenes of one or two colored shapes.

The digits (Alpaydin and Kaynak 1998) are 1,797 gray images of 8 x 8. The captions of a scene take size, color, shape and place
together to tell it apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from clip_exp.data.randomness import Draws, hash64

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.", "the digit {}.", "a handwritten {}.")
_HELD_OUT_EVERY = 5
_TEMPLATE = 4

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 40),
    "orange": (255, 140, 20),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = {"small": 0.11, "large": 0.21}  # half the side of the shape over the picture's
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
_SPLITS = {"train": 0, "val": 1}
_SCENE = 5
_SUPERSAMPLING = 4
_PAIRS = 0.75  # share of scenes with two shapes


@dataclass(frozen=True)
class GeneratedSample:
    """A picture and the other columns of its row."""

    picture: Image.Image
    columns: dict[str, str]


def digits(seed: int) -> tuple[list[GeneratedSample], list[GeneratedSample]]:
    """Training and held-out samples with columns `title` and `label`; every fifth picture of each class is held out.

    Args:
        seed: of the choice of each caption's template; pictures and split do not depend on it.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    seen = dict.fromkeys(range(len(WORDS)), 0)
    train: list[GeneratedSample] = []
    val: list[GeneratedSample] = []
    for i, (pixels, target) in enumerate(zip(data.images, data.target, strict=True)):
        word = WORDS[target]
        template = TEMPLATES[hash64(_TEMPLATE, seed, i) % len(TEMPLATES)]
        picture = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        held_out = seen[target] % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        (val if held_out else train).append(GeneratedSample(picture, {"title": template.format(word), "label": word}))
        seen[target] += 1
    return train, val


@dataclass(frozen=True)
class _Thing:
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


def scenes(split: str, count: int, image_size: int, seed: int) -> Iterator[GeneratedSample]:
    """Samples with the column `title`, such as "a small red circle above a large blue square".

    Args:
        split: `train` or `val`; other scenes are drawn in each.
        count: how many.
        image_size: side of the pictures, pixels.
        seed: of the scenes.
    """
    for i in range(count):
        yield _scene(Draws(_SCENE, _SPLITS[split], seed, i), image_size)


def _scene(draws: Draws, image_size: int) -> GeneratedSample:
    grey = 215 + draws.integer(40)
    side = image_size * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), (grey, grey, grey))
    first = _thing(draws)
    if draws.uniform() >= _PAIRS:
        _draw(picture, first, 0.5 + draws.uniform(-0.2, 0.2), 0.5 + draws.uniform(-0.2, 0.2))
        caption = str(first)
    else:
        second = _thing(draws)
        relation = list(RELATIONS)[draws.integer(len(RELATIONS))]
        x, y = RELATIONS[relation]
        for thing, sign in ((first, 1), (second, -1)):
            jitter_x, jitter_y = draws.uniform(-0.05, 0.05), draws.uniform(-0.05, 0.05)
            _draw(picture, thing, 0.5 + sign * 0.23 * x + jitter_x, 0.5 + sign * 0.23 * y + jitter_y)
        caption = f"{first} {relation} {second}"
    return GeneratedSample(picture.reduce(_SUPERSAMPLING), {"title": caption})


def _thing(draws: Draws) -> _Thing:
    size, color, shape = (list(options)[draws.integer(len(options))] for options in (SIZES, COLORS, SHAPES))
    return _Thing(size, color, shape)


def _draw(picture: Image.Image, thing: _Thing, x: float, y: float) -> None:
    side = picture.width
    radius = SIZES[thing.size] * side
    draw, color = ImageDraw.Draw(picture), COLORS[thing.color]
    if thing.shape == "circle":
        draw.ellipse([x * side - radius, y * side - radius, x * side + radius, y * side + radius], fill=color)
        return
    draw.polygon([(x * side + radius * u, y * side + radius * v) for u, v in _outline(thing.shape)], fill=color)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in -1..1."""
    if shape == "star":
        radii = (1.0, 0.42)
        return [
            (radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
        ]
    third = 1 / 3
    return {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
        "diamond": [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)],
        "cross": [
            (-third, -1.0),
            (third, -1.0),
            (third, -third),
            (1.0, -third),
            (1.0, third),
            (third, third),
            (third, 1.0),
            (-third, 1.0),
            (-third, third),
            (-1.0, third),
            (-1.0, -third),
            (-third, -third),
        ],
    }[shape]
