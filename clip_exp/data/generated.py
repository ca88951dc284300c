"""Generated data sets, written once to the output folder as ordinary tables and image files.

`digits` are scikit-learn's handwritten digits (Alpaydin and Kaynak 1998): 1,797 gray images of 8 x 8 pixels. `shapes`
are drawn scenes of one or two colored shapes; their captions differ in the combination of size, color, shape and
position.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from clip_exp.config.data import DataConfig, GenerateConfig, Generator
from clip_exp.data.randomness import Draws, hash64
from clip_exp.errors import CheckpointError
from clip_exp.storage import atomic_folder, lock, remove_leftovers, sync


@dataclass(frozen=True)
class GeneratedSample:
    """Image and the other columns of its row."""

    image: Image.Image
    columns: dict[str, str]


DIGITS_ROWS = 1442  # training rows of the 1,797 images; the others are held out
SHAPES_ROWS = 2000
_VERSION = 1  # part of the folder's name; increase it when a generator draws something else


@dataclass(frozen=True)
class GeneratedData:
    """Tables of a generated data set. Image paths are relative to the folder of the tables."""

    train: Path
    val: Path


def generate(config: GenerateConfig, output_dir: Path) -> GeneratedData:
    """Write the data set to `<output_dir>/data/<name>/`, unless it exists.

    The folder is created atomically, so a killed process leaves no partial data. Of several processes that call this at
    the same time, one writes, and the others wait for it.

    Args:
        config: kind and size of the data set; equal values give equal bytes.
        output_dir: output folder of the runs.

    Raises: CheckpointError if the folder cannot be written.
    """
    folder = Path(output_dir) / "data" / _name(config)
    data = GeneratedData(folder / "train.csv", folder / "val.csv")
    if folder.is_dir():
        return data
    if config.kind is Generator.digits:
        train, val = digits(config.seed)
        splits: dict[str, Iterable[GeneratedSample]] = {"train": train[: config.rows], "val": val[: config.val_rows]}
    else:
        rows = {"train": count_rows(config), "val": config.val_rows or 400}
        splits = {split: scenes(split, count, config.image_size, config.seed) for split, count in rows.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(f".lock-{folder.name}"), wait_s=math.inf, remove=True) as held:
            if held:
                remove_leftovers(folder)
            if folder.is_dir():
                return data
            # Without locks another process may be first, with the same bytes. Syncing thousands of images to disk would take long.
            with atomic_folder(folder, replace=False, durable=False) as partial:
                for split, samples in splits.items():
                    _write(partial, split, samples)
                    sync(partial / f"{split}.csv")
    except OSError as error:
        raise CheckpointError(
            f"Generated data cannot be written to {folder}: {error}. Set output_dir to a writable folder."
        ) from error
    return data


def resolve_generated(config: DataConfig, output_dir: Path) -> DataConfig:
    """Return the configuration with `generate` replaced by the generated tables, which are written if missing."""
    if config.generate is None:
        return config
    data = generate(config.generate, output_dir)
    tables = {"generate": None, "train": str(data.train), "val": str(data.val)}
    return config.model_copy(update={**tables, "image_key": "filepath", "caption_key": "title", "image_root": None})


def count_rows(config: GenerateConfig) -> int:
    """Return the number of training rows of the data set without generating it."""
    if config.kind is Generator.shapes:
        return config.rows or SHAPES_ROWS
    return min(config.rows or DIGITS_ROWS, DIGITS_ROWS)


def _name(config: GenerateConfig) -> str:
    parts = [config.kind.value, f"v{_VERSION}"]
    if config.rows is not None or config.val_rows is not None:
        parts.append(f"{config.rows or 'all'}x{config.val_rows or 'all'}")
    if config.kind is Generator.shapes:
        parts.append(f"{config.image_size}px")
    return "-".join([*parts, f"seed{config.seed}"])


def _write(folder: Path, split: str, samples: Iterable[GeneratedSample]) -> None:
    (folder / split).mkdir(parents=True)
    with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        for i, sample in enumerate(samples):
            if i == 0:
                table.writerow(["filepath", *sample.columns])
            path = f"{split}/{i:06d}.png"
            sample.image.save(folder / path, compress_level=1)
            table.writerow([path, *sample.columns.values()])


# Content: digits and scenes.

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
SIZES = {"small": 0.11, "large": 0.21}  # half the side of the shape over the image's
_THIRD = 1 / 3
_CORNERS = {  # in -1..1
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)],
    "star": [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate((1.0, 0.42) * 5)],
    "cross": [
        (-_THIRD, -1.0),
        (_THIRD, -1.0),
        (_THIRD, -_THIRD),
        (1.0, -_THIRD),
        (1.0, _THIRD),
        (_THIRD, _THIRD),
        (_THIRD, 1.0),
        (-_THIRD, 1.0),
        (-_THIRD, _THIRD),
        (-1.0, _THIRD),
        (-1.0, -_THIRD),
        (-_THIRD, -_THIRD),
    ],
}  # fmt: skip
RELATIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
_SPLITS = {"train": 0, "val": 1}
_SCENE = 5
_SUPERSAMPLING = 4
_PAIRS = 0.75  # fraction of scenes with two shapes


def digits(seed: int) -> tuple[list[GeneratedSample], list[GeneratedSample]]:
    """Return training and held-out samples with columns `title` and `label`.

    Every fifth image of each class is held out.

    Args:
        seed: seed for the templates of the captions; images and split do not depend on it.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    seen = dict.fromkeys(range(len(WORDS)), 0)
    train: list[GeneratedSample] = []
    val: list[GeneratedSample] = []
    for i, (pixels, target) in enumerate(zip(data.images, data.target, strict=True)):
        word = WORDS[target]
        template = TEMPLATES[hash64(_TEMPLATE, seed, i) % len(TEMPLATES)]
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        held_out = seen[target] % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        (val if held_out else train).append(GeneratedSample(image, {"title": template.format(word), "label": word}))
        seen[target] += 1
    return train, val


class _Thing(NamedTuple):
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


def scenes(split: str, count: int, image_size: int, seed: int) -> Iterator[GeneratedSample]:
    """Yield samples with the column `title`, such as "a small red circle above a large blue square".

    Args:
        split: `train` or `val`, which have different scenes.
        count: number of samples.
        image_size: side of the images, pixels.
        seed: seed of the scenes.
    """
    side = image_size * _SUPERSAMPLING
    for i in range(count):
        draws = Draws(_SCENE, _SPLITS[split], seed, i)
        gray = 215 + draws.integer(40)
        image = Image.new("RGB", (side, side), (gray, gray, gray))
        first = _thing(draws)
        if draws.uniform() >= _PAIRS:
            _draw(image, first, 0.5 + draws.uniform(-0.2, 0.2), 0.5 + draws.uniform(-0.2, 0.2))
            caption = str(first)
        else:
            second = _thing(draws)
            relation = list(RELATIONS)[draws.integer(len(RELATIONS))]
            x, y = RELATIONS[relation]
            for thing, sign in ((first, 1), (second, -1)):
                jitter_x, jitter_y = draws.uniform(-0.05, 0.05), draws.uniform(-0.05, 0.05)
                _draw(image, thing, 0.5 + sign * 0.23 * x + jitter_x, 0.5 + sign * 0.23 * y + jitter_y)
            caption = f"{first} {relation} {second}"
        yield GeneratedSample(image.reduce(_SUPERSAMPLING), {"title": caption})


def _thing(draws: Draws) -> _Thing:
    return _Thing(*(list(options)[draws.integer(len(options))] for options in (SIZES, COLORS, SHAPES)))


def _draw(image: Image.Image, thing: _Thing, x: float, y: float) -> None:
    side = image.width
    radius = SIZES[thing.size] * side
    draw, color = ImageDraw.Draw(image), COLORS[thing.color]
    if thing.shape == "circle":
        draw.ellipse([x * side - radius, y * side - radius, x * side + radius, y * side + radius], fill=color)
        return
    draw.polygon([(x * side + radius * u, y * side + radius * v) for u, v in _CORNERS[thing.shape]], fill=color)
