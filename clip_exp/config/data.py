"""Schema of `data`: the sources of image-text pairs, how they are read and shuffled, limits of bad data, and augmentation."""

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
    Name,
    NonNegative,
    Paths,
    PathText,
    Positive,
    Size,
    Target,
    Unused,
    default_of,
    exactly,
    plain,
)


class Captions(StrEnum):
    """Rows of the training stream: every image with one random caption per epoch, or every pair of the table."""

    random = "random"
    all = "all"


class OnBadRow(StrEnum):
    error = "error"
    skip = "skip"


class OnBadImage(StrEnum):
    error = "error"
    replace = "replace"  # type: ignore[assignment] # overrides a method of str


class Format(StrEnum):
    """Layout of training or validation data."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    json = "json"
    coco = "coco"
    karpathy = "karpathy"
    parquet = "parquet"
    arrow = "arrow"
    webdataset = "webdataset"
    folder = "folder"
    class_folders = "class_folders"
    chinese_clip = "chinese_clip"


class Shuffle(StrEnum):
    """Shuffling of rows: over the whole data set, or by blocks of neighboring rows."""

    full = "full"
    block = "block"


class Generator(StrEnum):
    """Data sets that clip_exp generates itself (`clip_exp.data.generated`)."""

    digits = "digits"
    shapes = "shapes"


class PairLabel(StrEnum):
    """Label of pairs with a repeated caption or image in a batch: a match (positive) or a mismatch (negative)."""

    positive = "positive"
    negative = "negative"


Bounds = Annotated[list[Positive], exactly(2)]


def _has_placeholder(template: str) -> str:
    if "{}" not in template:
        raise ValueError("must contain {} for the class name")
    return template


Template = Annotated[str, AfterValidator(_has_placeholder)]


# Formats of images that every command reads, by Pillow's names. A run's own `image_formats` decide what it trains on, and are
# read by later commands, too.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
_SUFFIX_FORMATS = {"JPG": "JPEG", "TIF": "TIFF", "HEIC": "HEIF", "HIF": "HEIF"}


def _pillow_names(names: list[str]) -> list[str]:
    """Return Pillow's names of formats, which may be named by their suffixes in any case, without repetitions."""
    return list(dict.fromkeys(_SUFFIX_FORMATS.get(name.upper(), name.upper()) for name in names))


class AugmentationConfig(Config):
    """Augmentation of training images.

    The random numbers depend only on (seed, epoch, row), not on the worker or rank. The parameters have the same
    meaning as in `torchvision.transforms.v2`, which implements the color and blur transforms.
    """

    scale: Annotated[list[Annotated[Positive, Field(le=1)]], exactly(2)] = Field(
        [0.9, 1.0], description="minimum and maximum area of the random crop, as a fraction of the image's area"
    )
    ratio: Bounds = Field(
        [0.75, 1.3333333333], description="minimum and maximum aspect ratio of the random crop, width over height"
    )
    horizontal_flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    color_jitter: Annotated[list[NonNegative], exactly(4)] | None = Field(
        None, description="strengths of the jitter of brightness, contrast, saturation and hue; null: no color jitter"
    )
    color_jitter_prob: Fraction = Field(1.0, description="probability of color_jitter")
    gray_scale_prob: Fraction = Field(0.0, description="probability of conversion to grayscale")
    gaussian_blur_prob: Fraction = Field(0.0, description="probability of Gaussian blur")
    gaussian_blur_sigma: Bounds = Field(
        [0.1, 2.0], description="minimum and maximum standard deviation of the blur, pixels"
    )

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
            raise ValueError("must have a hue (the last value) of at most 0.5")
        return strengths


class GenerateConfig(Config):
    """Generated data set, which is written to `<output_dir>/data/` before training."""

    kind: Generator = Field(description="generated data set: digits or shapes")
    rows: Count | None = Field(
        None, description="number of training rows; null: all available (digits) or 2,000 (shapes)"
    )
    val_rows: Count | None = Field(
        None, description="number of validation rows; null: all available (digits) or 400 (shapes)"
    )
    image_size: Size = Field(64, description="side of the square images in pixels (kind=shapes only)")
    seed: Index = Field(0, description="seed of the generated scenes (kind=shapes) and of the train/validation split")

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("image_size", lambda c: c.kind is Generator.digits, "with kind=digits, whose images have 8x8 pixels"),
    )

    def rules(self, at: str) -> Iterator[str]:
        if self.kind is Generator.shapes and not 16 <= self.image_size <= 1024:
            yield f"{at}image_size={self.image_size} must be between 16 and 1024 pixels."


Header = bool | Annotated[list[Annotated[Name, NOT_EMPTY]], NOT_EMPTY] | None


class Source(Config):
    """One of several sources of the training stream. Keys that are not set have the value of the same key of `data`."""

    path: Annotated[Paths, NOT_EMPTY] = Field(
        description="file or glob pattern, or a list of them that is read as a single table"
    )
    weight: Positive | None = Field(
        None,
        description="sampling weight, relative to the other sources; null, for all sources: each is sampled in proportion to its rows",
    )
    image_root: PathText | None = Field(None, description="overrides data.image_root for this source")
    image_key: str = Field("", description="overrides data.image_key for this source")
    caption_key: str | list[str] = Field("", description="overrides data.caption_key for this source")
    caption_weights: list[Positive] | None = Field(None, description="overrides data.caption_weights for this source")
    caption_list: bool = Field(False, description="overrides data.caption_list for this source")
    caption_lines: bool = Field(False, description="overrides data.caption_lines for this source")
    format: Format = Field(Format.auto, description="overrides data.format for this source")
    header: Header = Field(None, description="overrides data.header for this source")
    separator: str = Field("", description="overrides data.separator for this source")
    encoding: str = Field("", description="overrides data.encoding for this source")
    filter: str | None = Field(None, description="overrides data.filter for this source")

    written_out: ClassVar[bool] = False

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def reading(self) -> dict[str, Any]:
        """Values of `DataConfig` that this source overrides."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"path", "weight"}}

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def _kind_of_source(value: Any) -> str:
    return "source" if isinstance(value, dict | Source) else "path"


def _kind_of_sources(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else _kind_of_source(value)


_Entry = Annotated[
    Annotated[PathText, NOT_EMPTY, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_kind_of_source)
]
Sources = Annotated[
    Annotated[PathText, Tag("path")] | Annotated[Source, Tag("source")] | Annotated[list[_Entry], Tag("list")],
    Discriminator(_kind_of_sources),
]


def _sources(given: Any) -> list[Source]:
    entries = given if isinstance(given, list) else [] if given is None else [given]
    if not any(isinstance(entry, Source) for entry in entries):
        return [Source(path=[str(entry) for entry in entries])] if entries else []
    return [entry if isinstance(entry, Source) else Source(path=entry) for entry in entries]


# Keys that describe tables
OF_TABLES = (
    "filter", "image_root", "image_key", "caption_key", "caption_weights", "caption_list", "caption_lines", "label_key",
    "format", "header", "separator", "encoding", "on_bad_row", "max_empty_caption_fraction", "allow_outside_root",
)  # fmt: skip


def _kind_of_val(value: Any) -> str:
    if isinstance(value, Target) or (isinstance(value, dict) and "_target_" in value):
        return "target"
    return _kind_of_sources(value)


Validation = Annotated[
    Annotated[PathText, Tag("path")]
    | Annotated[Source, Tag("source")]
    | Annotated[list[_Entry], Tag("list")]
    | Annotated[Target, Tag("target")],
    Discriminator(_kind_of_val),
]


class DataConfig(Config):
    """Training and validation data."""

    name: str = Field(description="name of the data set, used in folder names and reports")
    train: Sources | None = Field(
        None,
        description="training pairs: a CSV, TSV, JSON Lines or Parquet file or WebDataset shards (.tar); a glob, {000..009}, a list of "
        "those, or sources with sampling weights: [{path: a.csv, weight: 3}, {path: b.tar, weight: 1}]",
    )
    val: Validation | None = Field(
        None,
        description="validation pairs: files, a glob or sources as for train, without weights; or {_target_: class, arguments} for your "
        "Dataset; null: no validation, unless val_fraction is set",
    )
    val_fraction: Annotated[Positive, Field(lt=1)] | None = Field(
        None,
        description="fraction of the images of train that are held out for validation, instead of val, by a hash of their paths; null: none",
    )
    val_seed: Index = Field(0, description="seed of the choice of the images that val_fraction holds out")
    generate: GenerateConfig | None = Field(
        None, description="data set that clip_exp generates, instead of train and val; null: none"
    )
    filter: str | None = Field(
        None,
        description="SQL condition on columns for rows to use: \"width >= 256 AND split = 'train'\"; null: all rows",
    )
    image_root: PathText | None = Field(
        None, description="folder that relative image paths refer to; null: the folder of the table"
    )
    image_key: str = Field("filepath", description="name of the column with image paths")
    caption_key: str | Annotated[list[Annotated[Name, NOT_EMPTY]], NOT_EMPTY] = Field(
        "title",
        description="name of the column with captions, or several: [alt_text, recaption]; empty ones are skipped",
    )
    caption_weights: list[Positive] | None = Field(
        None,
        description="probabilities with which a caption of each column of caption_key is drawn, relative to each other; null: every "
        "caption is equally probable",
    )
    caption_list: bool = Field(
        False, description="read captions that are written as lists, such as ['a dog', 'a pet'], as several captions"
    )
    caption_lines: bool = Field(False, description="read each line of a caption as a caption of its own")
    columns: list[Annotated[Name, NOT_EMPTY]] = Field(
        [],
        description="further columns of train, or fields of your Dataset's items, for the loss, by name: texts are tokenized and encoded "
        "with the captions, numbers and lists of numbers become float32 features",
    )
    label_key: str | None = Field(
        None,
        description="name of the column with class names in val, which adds zero-shot accuracy to the validation; null: none",
    )
    templates: Annotated[list[Template], NOT_EMPTY] = Field(
        ["a photo of a {}."],
        description="prompt templates of the zero-shot accuracy in validation, with {} for the class name",
    )
    format: Format = Field(
        Format.auto,
        description="layout of train and val: text (CSV, TSV), jsonl, json, coco, karpathy, parquet, arrow, webdataset, folder (images "
        "with .txt or .json files), class_folders, chinese_clip; auto: by extension and content",
    )
    header: Header = Field(
        None,
        description="names of the columns of a text table without a header row, in order: [id, filepath, title]; false: no header row, the "
        "columns are named 0, 1, …; null: detected",
    )
    separator: str = Field(
        "auto", description="separator of columns in text files: one character, \\t for a tab; auto: detected"
    )
    encoding: str = Field("auto", description="encoding of text files, by Python's name; auto: detected")
    captions: Captions = Field(
        Captions.random,
        description="random: each image once per epoch, with a random one of its captions; all: each pair once per epoch",
    )
    shuffle: Shuffle | None = Field(
        None,
        description="full: shuffle all rows; block: shuffle blocks of neighboring rows, for fast reading; null: block for shards, else full",
    )
    shuffle_block: Count = Field(64, description="number of neighboring rows in a block (shuffle=block)")
    shuffle_window: Count = Field(256, description="number of blocks whose rows are shuffled together (shuffle=block)")
    same_caption: PairLabel = Field(
        PairLabel.negative,
        description="default of loss.same_caption for this data set: positive if captions are class names, else negative",
    )
    num_workers: Annotated[Index, Field(le=4096)] | None = Field(
        None,
        description="processes per rank that decode images; null: CPU cores divided by the ranks of the machine, minus one, at most 8 "
        "when training on a CPU",
    )
    timeout_s: Positive | None = Field(
        240.0,
        description="seconds that training waits for a data loader worker that makes no progress, or for a row that it reads itself, before "
        "the run ends and names the row; null: no limit but hang_timeout_s",
    )
    on_bad_row: OnBadRow = Field(
        OnBadRow.error,
        description="malformed rows of a table: error stops the run, skip leaves them out and counts them",
    )
    on_bad_image: OnBadImage = Field(OnBadImage.replace, description="replace by another row's, and count; or error")
    max_bad_fraction: Fraction = Field(
        0.1, description="maximum fraction of bad images, and of bad rows in a table; the run stops above it"
    )
    max_empty_caption_fraction: Fraction = Field(
        0.1, description="maximum fraction of empty or blank captions in a table; the run does not start above it"
    )
    max_rows: Count | None = Field(
        None, description="number of rows of the training table to use, from the start; null: all"
    )
    max_image_pixels: Count = Field(
        40_000_000, description="maximum number of pixels of an image; larger images count as bad and are not decoded"
    )
    max_image_bytes: Count = Field(
        67_108_864, description="maximum size of an image file in bytes; larger files count as bad and are not read"
    )
    image_formats: Annotated[list[str], AfterValidator(_pillow_names)] = Field(
        list(IMAGE_FORMATS),
        description="accepted image formats, by Pillow's names; commands that use the run read them, too; HEIF (HEIC) needs "
        "pillow-heif",
    )
    allow_outside_root: bool = Field(
        False, description="allow relative image paths that lead out of image_root through .."
    )
    allow_changed: bool = Field(
        False, description="resume from a checkpoint even if the data has changed since it was saved"
    )
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    transform: Target | None = Field(
        None,
        description="transform of training images from uint8 [3, H, W] to uint8 [3, image_size, image_size], instead of the random crop and "
        "augmentation: {_target_: mine.Transform, arguments}; null: none",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            " ".join(f"augmentation.{name}" for name in AugmentationConfig.model_fields),
            lambda data: data.transform is not None,
            "with {at}transform, which replaces the augmentation",
            typed_only=True,
        ),
        Unused(
            "val_seed",
            lambda data: data.val_fraction is None,
            "without {at}val_fraction",
            "set that, or leave this out",
        ),
        Unused(
            "caption_weights",
            lambda data: data.captions is Captions.all,
            "with {at}captions=all, which uses every caption of an image",
        ),
        Unused("label_key", lambda data: not data.has_val, "without validation data", "set {at}val, or leave this out"),
        Unused(
            "label_key",
            lambda data: isinstance(data.val, Target),
            "with the Dataset {at}val, whose items have the labels",
        ),
        Unused(
            "templates",
            lambda data: not data.may_have_labels,
            "without labeled validation data",
            "set {at}val and {at}label_key, or leave this out",
            typed_only=True,
        ),
        Unused(
            "image_root image_key caption_key columns",
            lambda data: data.generate is not None,
            "with data={c.name}, which clip_exp generates",
        ),
        Unused(
            "shuffle_block shuffle_window",
            lambda data: data.shuffles_rows,
            "with a full shuffle",
            "set {at}shuffle=block, or leave this out",
        ),
        Unused(
            "max_bad_fraction",
            lambda data: data.on_bad_row == data.on_bad_image == "error",
            "with {at}on_bad_row and {at}on_bad_image both error, which stops at the first bad one",
        ),
    )

    @property
    def has_val(self) -> bool:
        return self.generate is not None or bool(self.val) or self.val_fraction is not None

    @property
    def may_have_labels(self) -> bool:
        """True if the validation data have class names, or may have them, as a Dataset."""
        return self.has_val and (self.label_key is not None or isinstance(self.val, Target))

    @property
    def val_sources(self) -> list[Source]:
        """Sources in `val`, as `sources`; empty without one, and for a Dataset."""
        return [] if isinstance(self.val, Target) else _sources(self.val)

    @property
    def val_paths(self) -> list[str]:
        """Files and patterns of the validation tables; empty without one."""
        return [path for source in self.val_sources for path in source.paths]

    @property
    def shuffles_rows(self) -> bool:
        """True if all rows are shuffled together, and no source is shuffled by blocks."""
        return self.shuffle is Shuffle.full or (self.shuffle is None and ".tar" not in str(self.train))

    @property
    def sources(self) -> list[Source]:
        """Sources in `train`: a single one for a path or a list of paths, or one per entry if an entry is a mapping."""
        return _sources(self.train)

    def rules(self, at: str) -> Iterator[str]:
        if self.generate is None and not self.train:
            yield (
                f"{at}train has no value: set it to a table of image-text pairs ({at}train=pairs.csv), or name your Dataset "
                f"(data=custom {at}_target_=mine.Pairs)."
            )
        if self.generate is not None and (self.train or self.val):
            yield f"{at}generate and {at}train exclude each other: use data=csv for your own tables."
        captions = self.caption_key if isinstance(self.caption_key, list) else [self.caption_key]
        yield from self._column_problems(
            at, {self.image_key: f"{at}image_key", **dict.fromkeys(captions, f"{at}caption_key")}
        )
        if self.val_fraction is not None and (self.val or self.generate is not None):
            yield f"{at}val_fraction and {at}{'val' if self.val else 'generate'} exclude each other: leave one of them out."
        if any(source.weight is not None for source in self.val_sources):
            yield f"{at}val.weight has no effect: validation uses every row once. Leave it out."
        yield from _weight_problems(at, self.caption_key, self.caption_weights)
        if any("caption_weights" in source.reading for source in self.val_sources):
            yield f"{at}val.caption_weights has no effect: validation uses all captions of an image. Leave it out."
        for source in self.sources:
            merged = {"caption_key": self.caption_key, "caption_weights": self.caption_weights, **source.reading}
            if source.reading.keys() & {"caption_key", "caption_weights"}:
                yield from _weight_problems(f"{at}train: ", merged["caption_key"], merged["caption_weights"])
        if len({source.weight is None for source in self.sources}) > 1:
            yield f"{at}train: set a weight for every source or for none. Without weights, sources are sampled in proportion to their rows."

    def _column_problems(self, at: str, given: dict[str, str]) -> Iterator[str]:
        if len(set(self.columns)) < len(self.columns):
            yield f"{at}columns names a column twice: name each once."
        for name in (name for name in given if name in self.columns):
            yield f"{at}columns names {name!r}, which is {given[name]}: leave it out, because the loss has it already."


class CustomDataConfig(DataConfig, Target):
    """Training data of a user's Dataset, which `_target_` names; other keys than those of `data` are its arguments.

    A parameter of the class with the name of a key of `data` gets the value of this key if it is required. The keys in
    `OF_TABLES` are arguments like any other, unless `data.val` is a table.
    """

    unused: ClassVar[tuple[Unused, ...]] = tuple(
        unused for unused in DataConfig.unused if not {*unused.keys.split()} & {*OF_TABLES}
    )

    @property
    def arguments(self) -> dict[str, Any]:
        set_keys = [key for key in OF_TABLES if getattr(self, key) != default_of(DataConfig.model_fields[key])]
        return {**super().arguments, **({} if self.val_paths else {key: plain(getattr(self, key)) for key in set_keys})}

    @property
    def shared(self) -> dict[str, Any]:
        """Values of the keys of `data` for required parameters of the class with the same names."""
        return {key: value for key in DataConfig.model_fields if (value := plain(getattr(self, key))) is not None}

    @property
    def optional(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the values
        return tuple(self.shared)

    def rules(self, at: str) -> Iterator[str]:
        for key in ("train", "generate"):
            if getattr(self, key) is not None:
                yield f"{at}_target_ and {at}{key} exclude each other: {self.target} is the training data. Leave {at}{key} out."
        yield from self._column_problems(
            at, {"image": "the image", "caption": "the caption", "captions": "the captions"}
        )


def _weight_problems(at: str, key: str | list[str], weights: list[float] | None) -> Iterator[str]:
    if isinstance(key, list) and len(set(key)) < len(key):
        yield f"{at}caption_key names a column twice: name each once."
    if weights is not None and len(weights) != (len(key) if isinstance(key, list) else 0):
        yield (
            f"{at}caption_weights has {len(weights)} values, but {at}caption_key must name as many columns: "
            f"{at}caption_key=[alt_text,recaption] {at}caption_weights=[0.3,0.7]."
        )


def _kind_of_data(value: Any) -> str:
    custom = "_target_" in value if isinstance(value, dict) else isinstance(value, CustomDataConfig)
    return (CustomDataConfig if custom else DataConfig).__name__


Data = Annotated[
    Annotated[CustomDataConfig, Tag("CustomDataConfig")] | Annotated[DataConfig, Tag("DataConfig")],
    Discriminator(_kind_of_data),
]
