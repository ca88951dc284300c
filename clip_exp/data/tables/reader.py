"""Interface of the table readers, for all formats: options, blocks of good rows, and a record of the bad rows."""

import difflib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from clip_exp.config.data import Format, OnBadRow
from clip_exp.data.tables import filters
from clip_exp.data.tables.features import numbers_of, to_json
from clip_exp.errors import ConfigError, DataError

COLUMNS = "columns."  # start of the setting of a further column
CAPTION = "caption_key"  # setting of the caption column


def is_column(setting: str) -> bool:
    """Return True for the setting of a further column, such as `columns.hard_negative`."""
    return setting.startswith(COLUMNS)


def is_caption(setting: str) -> bool:
    """Return True for the setting of a caption column: `caption_key`, or `caption_key.<i>` for one of several."""
    return key_of(setting) == CAPTION


def is_optional(setting: str) -> bool:
    """Return True if a missing value is no fault: that of one of several caption columns."""
    return setting.startswith(f"{CAPTION}.")


def key_of(setting: str) -> str:
    """Return the configuration key of a setting, without `data.`."""
    return setting.partition(".")[0]


@dataclass(frozen=True)
class TableOptions:
    """Options for reading a table. Equal options give equal rows, if the file is unchanged."""

    # Column names. Captions and labels are optional.
    image_key: str = "filepath"
    caption_key: str | tuple[str, ...] | None = "title"  # several columns: each of them has a caption, or none
    label_key: str | None = None
    columns: tuple[str, ...] = ()  # further columns for the loss (`tables.features`)
    # Captions that are several captions.
    caption_list: bool = False  # a text such as '["a dog", "a pet"]' is a list
    caption_lines: bool = False  # each line is a caption
    # Layout.
    format: Format = Format.auto
    templates: tuple[str, ...] = ()  # captions of the class folders, with {} for the class
    # For delimited text.
    header: bool | tuple[str, ...] | None = (
        None  # None: detect; False: none; names of the columns of a table without one
    )
    separator: str = "auto"
    encoding: str = "auto"
    # Rows that are used.
    val_fraction: float | None = None  # fraction of the images that are held out for validation
    val_seed: int = 0  # seed of their choice
    held_out: bool = False  # with `val_fraction`: use the images that are held out, instead of all others
    on_bad_row: OnBadRow = OnBadRow.error  # `skip`: leave bad rows out and count them by reason
    filter: str | None = None  # condition for the rows to use (`tables.filters`); None: all rows
    max_rows: int | None = None  # stop after this number of rows

    @property
    def requested(self) -> dict[str, str]:
        """Requested columns: setting to column name.

        A setting is a configuration key (`image_key`, …), `caption_key.<i>` for each of several caption columns, or
        `columns.<name>` for each of the further columns.
        """
        captions = {CAPTION: self.caption_key}
        if isinstance(self.caption_key, tuple):
            captions = {f"{CAPTION}.{i}": name for i, name in enumerate(self.caption_key)}
        requested = {"image_key": self.image_key, **captions, "label_key": self.label_key}
        named = {setting: name for setting, name in requested.items() if isinstance(name, str)}
        return {**named, **{COLUMNS + name: name for name in self.columns}}

    @property
    def filtered(self) -> frozenset[str]:
        """Names of the columns in the filter."""
        return filters.parse(self.filter).names if self.filter else frozenset()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for the identity of an index.

        `on_bad_row` is not part of it, because it does not change the rows of a table without bad rows. Newer options are part
        of it only if they are set, so that the indexes of older versions remain valid.
        """
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        default = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name != "on_bad_row" and (name not in _NEWER or getattr(self, name) != default[name])
        }


_NEWER = (
    "columns",
    "caption_list",
    "caption_lines",
    "format",
    "templates",
    "header",
    "val_fraction",
    "val_seed",
    "held_out",
)


# Columns of the library `datasets` and of img2dataset
_IMAGE_COLUMNS, _CAPTION_COLUMNS = ("file_name", "image", "jpg"), ("caption", "text")


def conventional(requested: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the requested columns, with those that `datasets` or img2dataset write instead of default columns that are missing.

    The caption column is replaced only if the image column is.
    """
    found = dict(requested)
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if found["image_key"] != TableOptions.image_key or found["image_key"] in names or image is None:
        return found
    caption = next((name for name in _CAPTION_COLUMNS if name in names), None)
    if found.get(CAPTION) == TableOptions.caption_key and TableOptions.caption_key not in names and caption is not None:
        found[CAPTION] = caption
    return {**found, "image_key": image}


# Signatures, by which a changed file is detected.

_BLOCK = 1 << 14  # bytes
_MAX_BLOCKS, _MIN_BLOCKS = 256, 2  # sampled blocks per file
_TOTAL_BLOCKS = 4096  # sampled blocks of all files of a table together


class FileSignature(NamedTuple):
    """Size, modification time and a sample of the content of a file, to detect a change without reading all of it."""

    bytes: int
    mtime_ns: int
    sample: str  # hash of the first, the last and evenly spaced blocks, or of the whole content of a small file

    @classmethod
    def of(cls, file: Path, files: int = 1) -> "FileSignature":
        """Compute the signature of a file, or of a folder: the names of its files, and sizes and times of those that are no images.

        Args:
            files: number of files of the table; with many files, each is sampled less.

        Raises: OSError.
        """
        if file.is_dir():
            return cls._of_folder(file)
        blocks = min(_MAX_BLOCKS, max(_MIN_BLOCKS, _TOTAL_BLOCKS // files))
        with open(file, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256()
            if status.st_size <= blocks * _BLOCK:
                offsets = list(range(0, status.st_size, _BLOCK))
            else:
                offsets = [(status.st_size - _BLOCK) * i // (blocks - 1) for i in range(blocks)]
            for offset in offsets:
                digest.update(os.pread(stream.fileno(), _BLOCK, offset))
        return cls(status.st_size, status.st_mtime_ns, digest.hexdigest())

    @classmethod
    def _of_folder(cls, folder: Path) -> "FileSignature":
        digest, size = hashlib.sha256(), 0
        for path in files_in(str(folder)):
            digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0")
            if not path.lower().endswith(IMAGE_SUFFIXES):
                status = os.stat(path)
                size += status.st_size
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return cls(size, 0, digest.hexdigest())

    @classmethod
    def of_table(cls, file: Path, files: int) -> "FileSignature":
        """Compute the signature of a file that the configuration names.

        Raises: ConfigError if it cannot be read.
        """
        try:
            return cls.of(file, files)
        except OSError as error:
            raise unreadable(file, error) from error


# Extensions of images. The first one in a sample is used, as in open_clip.
IMAGES = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGES)


def files_in(top: str) -> Iterator[str]:
    """Yield the files in a folder and its subfolders, except hidden ones, sorted by name within each folder.

    Links are followed, and each folder is visited once.
    """
    for folder, names in folders_in(top):
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def folders_in(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and its subfolders except hidden ones, with the names of their files, in order.

    Links are followed, and each folder is visited once.
    """
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(top, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError:  # removed meanwhile
            continue
        if (place := (status.st_dev, status.st_ino)) in seen:
            names.clear()
            continue
        seen.add(place)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder, sorted(files)


def unreadable(file: Path, error: OSError) -> ConfigError:
    """Return the error for a table file that cannot be opened or read."""
    return ConfigError(f"The table {file} cannot be read: {error.strerror or error}.")


# Good rows, and the record of the bad ones.

MAX_CAPTION = 32_768  # characters; a longer caption is a bad row, usually caused by a quote that is never closed
MAX_COLUMN = (
    131_072  # characters of a text in a further column, which may be a list of numbers; limit of the csv module
)
MAX_EXAMPLES = 1_000  # bad rows per file that are recorded one by one


@dataclass(frozen=True)
class RowBlock:
    """Good rows of one file, in order."""

    columns: dict[str, pa.Array]  # by setting (`TableOptions.requested`): strings or lists of strings, no nulls
    # By name, each [rows, …]:
    # - lines, int64: number of the line, Parquet row or shard sample in which each row starts, from 1
    # - members, int64 [rows, 2]: offset and size of each image, in the file or in the store of images
    # - caption_columns, int8: which of several caption columns the caption is from
    numbers: dict[str, np.ndarray]
    extra: dict[str, pa.Array] | None = None  # columns of the filter, as stored in the file
    images: pa.Array | None = None  # content of each image, to be stored; binary

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lines(self) -> np.ndarray:
        return self.numbers["lines"]

    @property
    def batch(self) -> pa.RecordBatch:
        """The columns as an Arrow record batch."""
        return pa.RecordBatch.from_arrays(list(self.columns.values()), list(self.columns))

    def take(self, rows: np.ndarray) -> "RowBlock":
        """Return some rows, in any order and also several times: int64 [n]."""
        chosen = pa.Array.from_buffers(
            pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows, np.int64))]
        )
        columns = {name: array.take(chosen) for name, array in self.columns.items()}
        extra = None if self.extra is None else {name: array.take(chosen) for name, array in self.extra.items()}
        images = None if self.images is None else self.images.take(chosen)
        return RowBlock(columns, {name: values[rows] for name, values in self.numbers.items()}, extra, images)

    def keep(self, mask: np.ndarray) -> "RowBlock":
        """Return the rows for which the mask, bool [rows], is true."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def slice(self, start: int, rows: int) -> "RowBlock":
        """Return up to `rows` rows from `start`, without a copy. Only for blocks without `extra` and `images`."""
        if start == 0 and rows >= len(self):
            return self
        columns = {name: array.slice(start, rows) for name, array in self.columns.items()}
        return RowBlock(columns, {name: values[start : start + rows] for name, values in self.numbers.items()})


def concat(blocks: Sequence[RowBlock]) -> RowBlock:
    """Join blocks of the same file or of files of the same kind. Only for blocks without `extra` and `images`."""
    if len(blocks) == 1:
        return blocks[0]
    columns = {name: pa.concat_arrays([block.columns[name] for block in blocks]) for name in blocks[0].columns}
    numbers = {name: np.concatenate([block.numbers[name] for block in blocks]) for name in blocks[0].numbers}
    return RowBlock(columns, numbers)


@dataclass
class BadRows:
    """Record of the bad rows of one file, which raises an error at the first one or counts them by reason."""

    file: Path  # for messages
    skip: bool  # leave bad rows out (`data.on_bad_row=skip`)
    unit: str = "line"  # unit of the number of a row: line, row or sample
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str]] = field(default_factory=list)  # the first ones: number and reason

    def add(self, line: int, reason: str, detail: str = "", fix: str = "") -> None:
        """Record a bad row.

        Args:
            line: number of the line in which it starts, from 1.
            reason: short name of the kind of fault, by which rows are counted.
            detail: exact description; empty: use `reason`.
            fix: sentence on how to repair it. The message also mentions that bad rows can be skipped.

        Raises: DataError unless bad rows are skipped.
        """
        if not self.skip:
            repair = f"{fix.rstrip('.')}, or skip" if fix else "Repair it, or skip"
            raise DataError(
                f"{self.file}, {self.unit} {line}: {detail or reason}. {repair} bad rows with data.on_bad_row=skip."
            )
        self.counts[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((line, reason))


class Reader(Protocol):
    """Reader of one file. `bad` is complete after the last block."""

    bad: BadRows
    bytes_read: int  # bytes read so far, for the progress bar

    def blocks(self) -> Iterator[RowBlock]:
        """Yield the good rows.

        Raises: DataError for a bad row that is not skipped, for a file of another format, and for missing columns;
            ConfigError for a file that cannot be opened.
        """
        ...


# Values: allowed image paths, captions, labels and further columns in formats with typed values.

_WHAT = {"image_key": "image path", "caption_key": "caption", "label_key": "label"}


class BadValue(Exception):
    """Error raised for a value that makes its row bad, with the kind of fault and an exact description."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def value_of(setting: str, name: str, value: object) -> str | list[str]:
    """Return the text of a value, or the captions of a list; see `text_of`. A null in a list is left out.

    Raises: BadValue.
    """
    if not is_caption(setting) or not isinstance(value, list):
        return text_of(setting, name, value)
    return [text_of(setting, name, each) for each in value if each is not None]


def text_of(setting: str, name: str, value: object) -> str:
    """Return the text of a value: a string verbatim, and numbers of a further column as JSON.

    Other types are not converted to text: a number as a caption usually means a wrong column. Only labels may be
    integers. A missing label (null) is the empty label, which means no class.

    Args:
        setting: key of `TableOptions.requested`.
        name: name of the column, for messages.

    Raises: BadValue.
    """
    if value is None and is_optional(setting):
        return ""
    if setting == "label_key" and (value is None or type(value) is int):
        return "" if value is None else str(value)
    if is_column(setting) and isinstance(value, int | float | list | np.ndarray) and not isinstance(value, bool):
        return _numbers_as_text(setting, name, value)
    what = what_of(setting)
    if value is None:
        raise BadValue(*absent(setting, name))
    if not isinstance(value, str):
        kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
        shown = f"{kinds.get(type(value), type(value).__name__)}: {_shortened(str(value))}"
        raise BadValue(f"the {what} is not text", f"the {_named(setting, name)} is not text but {shown}")
    if not value and setting == "image_key":
        raise BadValue(f"no {what}", f"the {_named(setting, name)} is empty")
    if "\0" in value:
        raise BadValue("NUL character", f"the {_named(setting, name)} contains a NUL character")
    if len(value) > max_length(setting):
        raise BadValue(*longer_than(setting, name, f"{len(value):,} characters, more than {max_length(setting):,}"))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadValue("not Unicode", f"the {_named(setting, name)} contains a lone surrogate") from error
    return value


def _numbers_as_text(setting: str, name: str, value: int | float | list[Any] | np.ndarray) -> str:
    if isinstance(value, float) and math.isnan(value):  # written for a missing number
        raise BadValue(*absent(setting, name))
    try:
        return to_json(numbers_of(value))
    except ValueError as error:
        detail = f"the {_named(setting, name)} is {error}, but must be a text, a number or a list of numbers"
        raise BadValue(f"the {what_of(setting)} is not numbers", detail) from error


def what_of(setting: str) -> str:
    """Return the name of a setting's values for messages. Counts by reason distinguish further columns by it."""
    return _WHAT.get(key_of(setting)) or f"value of {setting.removeprefix(COLUMNS)}"


def _named(setting: str, name: str) -> str:
    return f"value of {name!r}" if is_column(setting) else f"{what_of(setting)} {name!r}"


def max_length(setting: str) -> int:
    """Return the maximum number of characters of a text."""
    return MAX_COLUMN if is_column(setting) else MAX_CAPTION


def longer_than(setting: str, name: str, measure: str) -> tuple[str, str]:
    """Return reason and detail for a text with too many characters or bytes."""
    return f"{what_of(setting)} too long", f"the {_named(setting, name)} has {measure}"


def absent(setting: str, name: str) -> tuple[str, str]:
    """Return reason and detail for a missing value."""
    what = what_of(setting)
    return f"no {what}", f"there is no {what} ({name!r} is missing or null; data.{key_of(setting)})"


def no_column(name: str, setting: str, names: Iterable[str], what: str = "column") -> str:
    """Return the end of a message that starts with the file: the missing column, the existing ones and a suggestion.

    Args:
        what: word of the format for a column.
    """
    listed = list(names)
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in listed], n=1)
    nearest = next((other for other in listed if close and other.lower() == close[0] and other.isprintable()), None)
    shown = ", ".join(repr(_shortened(other)) for other in listed[:20]) or "none"
    key = key_of(setting)
    if setting == "filter":
        # As SQL has it, "train" in double quotes is a column.
        fix = f"{f' Did you mean {nearest!r}?' if nearest else ''} If it is text, write it in single quotes: '{name}'."
    elif is_column(setting):
        fix = f" Name {nearest or '<one of them>'} in data.columns."
    else:
        fix = f" Set data.{key}={nearest or '<one of them>'}."
    return f"has no {what} {name!r} (data.{key}). Its {what}s: {shown}.{fix}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
