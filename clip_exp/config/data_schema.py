"""The types, units and documentation of `data`: which pairs, how they are read, what may be wrong with them, what is drawn for them."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from clip_exp.config.missing import MISSING


class Captions(StrEnum):
    """What a row of the training stream is: an image with one caption drawn per epoch, or every pair of the table."""

    random = "random"
    all = "all"


class OnBadRow(StrEnum):
    error = "error"
    skip = "skip"


class OnBadImage(StrEnum):
    error = "error"
    replace = "replace"  # type: ignore[assignment] # the name that users write, though a str has a method of that name


class Shuffle(StrEnum):
    """How far a row may move: anywhere, or among the blocks of neighboring rows that it was drawn with."""

    full = "full"
    block = "block"


class Generator(StrEnum):
    """Data sets that the project makes itself (`clip_exp.data.generated`)."""

    digits = "digits"
    shapes = "shapes"


class PairLabel(StrEnum):
    """How a repeated caption or picture inside a batch counts: as another match or as a mismatch."""

    positive = "positive"
    negative = "negative"


@dataclass
class AugmentationConfig:
    """What happens to training pictures. Drawn from a generator seeded by (seed, epoch, row), whatever the worker or rank.

    Numbers mean what they do in `torchvision.transforms.v2`, whose functions change colors and sharpness.
    """

    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])  # area of the crop over the picture's
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333333])  # width over height of the crop
    horizontal_flip: float = 0.0  # probability
    color_jitter: list[float] | None = None  # strengths of brightness, contrast, saturation, hue; null: none
    color_jitter_prob: float = 1.0  # probability of `color_jitter`
    gray_scale_prob: float = 0.0  # probability of grey
    gaussian_blur_prob: float = 0.0  # probability of blur
    gaussian_blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels, smallest and largest


@dataclass
class GenerateConfig:
    """A data set that clip_exp writes to `<output_dir>/data/` before training."""

    kind: Generator = MISSING
    rows: int | None = None  # training rows; null: all there are (digits) or 2,000 (shapes)
    val_rows: int | None = None
    image_size: int = 64  # pixels (shapes)
    seed: int = 0


@dataclass
class DataConfig:
    name: str = MISSING
    # Image-text pairs: a CSV, TSV, JSON Lines or Parquet file or WebDataset shards (.tar); a glob, {000..009}, or a list of
    # those. Sources that are mixed by weight are a list of mappings: [{path: a.csv, weight: 3}, {path: b.tar, weight: 1}].
    train: Any = None
    val: Any = None  # likewise, without weights; optional
    generate: GenerateConfig | None = None  # instead of `train` and `val`
    filter: str | None = None  # which rows are used, by their columns: "width >= 256 and similarity > 0.28"
    image_root: str | None = None  # folder that relative image paths start from; null: the table's own folder
    image_key: str = "filepath"
    caption_key: str = "title"
    label_key: str | None = None  # column of class names in `val`: adds zero-shot accuracy to validation
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])  # prompts for that accuracy
    separator: str = "auto"  # auto, or one character; tab may be written \t
    encoding: str = "auto"
    captions: Captions = Captions.random
    shuffle: Shuffle | None = None  # null: block for shards, full for tables
    shuffle_block: int = 64  # neighboring rows that stay together (shuffle=block)
    shuffle_window: int = 256  # blocks whose rows are mixed with each other (shuffle=block)
    # What `loss.same_caption` is unless set: positive where captions name classes.
    same_caption: PairLabel = PairLabel.negative
    # Processes that decode images, per rank; null: the usable cores over the machine's ranks, one kept for training; at most 8 on a CPU.
    num_workers: int | None = None
    on_bad_row: OnBadRow = OnBadRow.error
    on_bad_image: OnBadImage = OnBadImage.replace
    max_bad_fraction: float = 0.1  # bad pictures over all, or bad rows over those of a table, above which the run stops
    max_empty_caption_fraction: float = (
        0.1  # empty or blank captions over all of a table, above which the run does not start
    )
    max_rows: int | None = None  # use only the first rows of the training table
    max_image_pixels: int = 40_000_000  # larger pictures are refused from their header
    max_image_bytes: int = 67_108_864  # larger files are refused unread
    image_formats: list[str] = field(default_factory=lambda: ["JPEG", "PNG", "WEBP", "GIF", "BMP"])  # Pillow's names
    allow_outside_root: bool = False  # read images whose relative path leaves `image_root` by `..`
    allow_changed: bool = False  # go on from a checkpoint though the data is no longer what it was
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
