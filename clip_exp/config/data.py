"""The schema of `data`: which pairs, how they are read, what may be wrong with them, what is drawn for them."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_serializer

from clip_exp.config.base import (
    NOT_EMPTY,
    Config,
    Count,
    Fraction,
    Index,
    NonNegative,
    Paths,
    PathText,
    Positive,
    Size,
    Unused,
    exactly,
)


class Captions(StrEnum):
    """Rows of the training stream: an image with one caption drawn per epoch, or every pair of the table."""

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
    """How a repeated caption or image inside a batch counts: as another match or as a mismatch."""

    positive = "positive"
    negative = "negative"


Bounds = Annotated[list[Positive], exactly(2)]


def _has_a_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError("needs a {} for the class name")
    return template


Template = Annotated[str, AfterValidator(_has_a_place)]


class AugmentationConfig(Config):
    """What happens to training images. Drawn from a generator seeded by (seed, epoch, row), whatever the worker or rank.

    Numbers mean what they do in `torchvision.transforms.v2`, whose functions change colors and sharpness.
    """

    scale: Annotated[list[Annotated[Positive, Field(le=1)]], exactly(2)] = Field(
        [0.9, 1.0], description="area of the crop over the image's, smallest and largest"
    )
    ratio: Bounds = Field([0.75, 1.3333333333], description="width over height of the crop, smallest and largest")
    horizontal_flip: Fraction = Field(0.0, description="probability of a flip")
    color_jitter: Annotated[list[NonNegative], exactly(4)] | None = Field(
        None, description="strengths of brightness, contrast, saturation, hue; null: none"
    )
    color_jitter_prob: Fraction = Field(1.0, description="probability of `color_jitter`")
    gray_scale_prob: Fraction = Field(0.0, description="probability of gray")
    gaussian_blur_prob: Fraction = Field(0.0, description="probability of blur")
    gaussian_blur_sigma: Bounds = Field([0.1, 2.0], description="pixels, smallest and largest")

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "color_jitter_prob",
            lambda augmentation: augmentation.color_jitter is None,
            "without {at}color_jitter",
            "set that, or leave this out",
            typed_only=True,
        ),
        Unused(
            "gaussian_blur_sigma",
            lambda augmentation: augmentation.gaussian_blur_prob == 0,
            "with {at}gaussian_blur_prob=0",
            "raise that, or leave this out",
        ),
    )

    @field_validator("scale", "ratio", "gaussian_blur_sigma")
    @classmethod
    def _smaller_first(cls, bounds: list[float]) -> list[float]:
        if bounds[0] > bounds[1]:
            raise ValueError("must have the smaller number first")
        return bounds

    @field_validator("color_jitter")
    @classmethod
    def _hue_at_most_half(cls, strengths: list[float] | None) -> list[float] | None:
        if strengths is not None and strengths[3] > 0.5:
            raise ValueError("must have a hue of at most 0.5, its last strength")
        return strengths


class GenerateConfig(Config):
    """A data set that clip_exp writes to `<output_dir>/data/` before training."""

    kind: Generator = Field(description="digits or shapes")
    rows: Count | None = Field(None, description="training rows; null: all there are (digits) or 2,000 (shapes)")
    val_rows: Count | None = Field(None, description="validation rows; null: all there are (digits) or 400 (shapes)")
    image_size: Size = Field(64, description="pixels (shapes)")
    seed: Index = Field(0, description="seed of the drawn scenes (shapes), and of the split")

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("image_size", lambda c: c.kind is Generator.digits, "on kind=digits, whose images are 8 pixels a side"),
    )

    def rules(self, at: str) -> Iterator[str]:
        if self.kind is Generator.shapes and not 16 <= self.image_size <= 1024:
            yield f"{at}image_size={self.image_size} must be between 16 and 1024 pixels."


class Source(Config):
    """One of several sources of the training stream. What it does not say is as `data` has it."""

    path: Annotated[Paths, NOT_EMPTY] = Field(description="file, pattern, or a list of them that is read as one table")
    weight: Positive | None = Field(
        None, description="how often it is drawn, relative to the others; all have one, or none"
    )
    image_root: PathText | None = Field(None, description="see data.image_root")
    image_key: str = Field("", description="see data.image_key")
    caption_key: str = Field("", description="see data.caption_key")
    separator: str = Field("", description="see data.separator")
    encoding: str = Field("", description="see data.encoding")
    filter: str | None = Field(None, description="see data.filter")

    written_out: ClassVar[bool] = False

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def reading(self) -> dict[str, Any]:
        """Values of `DataConfig` that are different for this source."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"path", "weight"}}

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def _kind_of_source(value: Any) -> str:
    return "source" if isinstance(value, dict | Source) else "path"


def _kind_of_sources(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else _kind_of_source(value)


_Entry = Annotated[Annotated[PathText, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_kind_of_source)]
Sources = Annotated[
    Annotated[PathText, Tag("path")] | Annotated[Source, Tag("source")] | Annotated[list[_Entry], Tag("list")],
    Discriminator(_kind_of_sources),
]


class DataConfig(Config):
    name: str = Field(description="name of the data, for folders and reports")
    train: Sources | None = Field(
        None,
        description="image-text pairs: a CSV, TSV, JSON Lines or Parquet file or WebDataset shards (.tar); a glob, {000..009}, a list of "
        "those, or sources mixed by weight: [{path: a.csv, weight: 3}, {path: b.tar, weight: 1}]",
    )
    val: Paths | None = Field(None, description="held-out pairs, likewise, without weights")
    generate: GenerateConfig | None = Field(
        None, description="data set that clip_exp makes, instead of `train` and `val`"
    )
    filter: str | None = Field(
        None, description='rows that are used, by their columns: "width >= 256 and similarity > 0.28"'
    )
    image_root: PathText | None = Field(
        None, description="folder that relative image paths start from; null: the table's own folder"
    )
    image_key: str = Field("filepath", description="column of image paths")
    caption_key: str = Field("title", description="column of captions")
    label_key: str | None = Field(
        None, description="column of class names in `val`: adds zero-shot accuracy to validation"
    )
    templates: Annotated[list[Template], NOT_EMPTY] = Field(
        ["a photo of a {}."], description="prompts for that accuracy, each with {} for the class name"
    )
    separator: str = Field("auto", description="auto, or one character; tab may be written \\t")
    encoding: str = Field("auto", description="auto, or Python's name of an encoding")
    captions: Captions = Field(
        Captions.random, description="random: one of an image's captions per epoch; all: every pair is a row"
    )
    shuffle: Shuffle | None = Field(
        None, description="full, or block: neighboring rows are read together; null: block for shards, full for tables"
    )
    shuffle_block: Count = Field(64, description="neighboring rows that stay together (shuffle=block)")
    shuffle_window: Count = Field(256, description="blocks whose rows are mixed with each other (shuffle=block)")
    same_caption: PairLabel = Field(
        PairLabel.negative, description="what `loss.same_caption` is unless set: positive where captions name classes"
    )
    num_workers: Annotated[Index, Field(le=4096)] | None = Field(
        None,
        description="processes that decode images, per rank; null: the usable cores over the machine's ranks, one kept for training, at most "
        "8 on a CPU",
    )
    on_bad_row: OnBadRow = Field(OnBadRow.error, description="error, or skip: leave bad rows out and count them")
    on_bad_image: OnBadImage = Field(OnBadImage.replace, description="replace by another row's, and count; or error")
    max_bad_fraction: Fraction = Field(
        0.1, description="bad images over all, or bad rows over those of a table, above which the run stops"
    )
    max_empty_caption_fraction: Fraction = Field(
        0.1, description="empty or blank captions over all of a table, above which the run does not start"
    )
    max_rows: Count | None = Field(None, description="use only the first rows of the training table")
    max_image_pixels: Count = Field(40_000_000, description="pixels; larger images are refused from their header")
    max_image_bytes: Count = Field(67_108_864, description="bytes; larger files are refused unread")
    image_formats: list[str] = Field(
        ["JPEG", "PNG", "WEBP", "GIF", "BMP"], description="formats that are read, by Pillow's names"
    )
    allow_outside_root: bool = Field(False, description="read images whose relative path leaves `image_root` by `..`")
    allow_changed: bool = Field(False, description="resume from a checkpoint though the data has changed since")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("label_key", lambda data: not data.has_val, "without validation data", "set {at}val, or leave this out"),
        Unused(
            "templates",
            lambda data: data.label_key is None or not data.has_val,
            "without validation data that have labels",
            "set {at}val and {at}label_key, or leave this out",
            typed_only=True,
        ),
        Unused(
            "image_root image_key caption_key",
            lambda data: data.generate is not None,
            "with data={c.name}, which clip_exp generates",
        ),
        Unused(
            "shuffle_block shuffle_window",
            lambda data: data.shuffles_rows,
            "on a full shuffle",
            "set {at}shuffle=block, or leave this out",
        ),
        Unused(
            "max_bad_fraction",
            lambda data: data.on_bad_row == data.on_bad_image == "error",
            "where {at}on_bad_row and {at}on_bad_image are error, which stops at the first",
        ),
    )

    @property
    def has_val(self) -> bool:
        return self.generate is not None or bool(self.val)

    @property
    def shuffles_rows(self) -> bool:
        """Whether no source is shuffled by blocks, as shards are unless `shuffle` says otherwise."""
        return self.shuffle is Shuffle.full or (self.shuffle is None and ".tar" not in str(self.train))

    @property
    def sources(self) -> list[Source]:
        """The entries of `train`: one for a path or a list of paths, one for each entry of a list that has a mapping."""
        entries = self.train if isinstance(self.train, list) else [] if self.train is None else [self.train]
        if not any(isinstance(entry, Source) for entry in entries):
            return [Source(path=[str(entry) for entry in entries])] if entries else []
        return [entry if isinstance(entry, Source) else Source(path=entry) for entry in entries]

    def rules(self, at: str) -> Iterator[str]:
        if self.generate is None and not self.train:
            yield f"{at}train has no value: give a table of image-text pairs ({at}train=pairs.csv)."
        if self.generate is not None and (self.train or self.val):
            yield f"{at}generate and {at}train exclude each other: use data=csv for your own tables."
        if len({source.weight is None for source in self.sources}) > 1:
            yield f"{at}train: give every source a weight, or none: without weights each is drawn as often as it has rows."
