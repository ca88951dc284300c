"""What the reader of a table's file is given and gives, whatever the format: options; blocks of good rows, and an account of the bad ones."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables import filters
from clip_exp.errors import ConfigError, DataError


@dataclass(frozen=True)
class TableOptions:
    """How a table is read. Two readings by equal options of an unchanged file give equal rows."""

    # Names of the columns; captions and labels are optional.
    image_key: str = "filepath"
    caption_key: str | None = "title"
    label_key: str | None = None
    # Of delimited text: `auto`, or what they are.
    separator: str = "auto"
    encoding: str = "auto"
    on_bad_row: OnBadRow = OnBadRow.error  # `error`, or `skip` to leave bad rows out and count them by reason
    filter: str | None = None  # which rows are kept (`tables.filters`); None: all
    max_rows: int | None = None  # stop after that many rows

    @property
    def wanted(self) -> dict[str, str]:
        """Key of the configuration (`image_key`, …) to the name of the column."""
        wanted = {"image_key": self.image_key, "caption_key": self.caption_key, "label_key": self.label_key}
        return {setting: name for setting, name in wanted.items() if name is not None}

    @property
    def filtered(self) -> frozenset[str]:
        """Names of the columns that the filter needs."""
        return filters.parse(self.filter).names if self.filter else frozenset()

    def as_json(self) -> dict[str, Any]:
        """For the identity of an index. What happens to bad rows is not part of it: where there are none, the rows are the same."""
        return {name: value for name, value in asdict(self).items() if name != "on_bad_row"}


# Whether a file is still the one that was read.

_BLOCK = 1 << 14  # bytes
_MOST_BLOCKS, _FEWEST_BLOCKS = 256, 2  # of a file
_ALL_BLOCKS = 4096  # of a table's files together, where they are many


class FileSignature(NamedTuple):
    """What is known of a file without reading all of it."""

    bytes: int
    mtime_ns: int
    sample: str  # hash of the first, the last and evenly spread blocks; of everything in a file that is no longer than these

    @classmethod
    def of(cls, file: Path, files: int = 1) -> "FileSignature":
        """The signature of a file.

        Args:
            files: how many are looked at together; each of many is sampled less.

        Raises: OSError.
        """
        blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, _ALL_BLOCKS // files))
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
    def of_table(cls, file: Path, files: int) -> "FileSignature":
        """`of` a file that the configuration names.

        Raises: ConfigError.
        """
        try:
            return cls.of(file, files)
        except OSError as error:
            raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> ConfigError:
    """Return what to report of a table's file that cannot be opened or read."""
    return ConfigError(f"The table {file} cannot be read: {error.strerror or error}.")


# Good rows, and an account of the bad ones.

MAX_CAPTION = 32_768  # characters; longer ones are bad rows: more often a quote that never closes than a caption
MAX_EXAMPLES = 1_000  # bad rows of a file that are remembered one by one


class RowBlock(NamedTuple):
    """Good rows of one file, in order."""

    columns: dict[str, pa.Array]  # by key of the configuration (image_key, …): LargeString, no nulls
    lines: np.ndarray  # int64: where each row starts, counted from 1: a line, a row of Parquet, a sample of a shard
    members: np.ndarray | None = None  # int64 [rows, 2]: offset and size of each image in its shard, bytes
    extra: dict[str, pa.Array] | None = None  # columns that the filter names, as the file has them

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def batch(self) -> pa.RecordBatch:
        """The columns as Arrow stores them."""
        return pa.RecordBatch.from_arrays(list(self.columns.values()), list(self.columns))


@dataclass
class BadRows:
    """Bad rows of one file: raised at the first, or counted by reason."""

    file: Path  # for messages
    skip: bool  # leave bad rows out (`data.on_bad_row=skip`)
    unit: str = "line"  # what the number of a row counts: line, row, sample
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str]] = field(default_factory=list)  # the first ones: line and reason

    def add(self, line: int, reason: str, detail: str = "", fix: str = "") -> None:
        """Note a bad row.

        Args:
            line: where it starts, counted from 1.
            reason: the kind of fault, a few words that are the same for all rows that have it.
            detail: what exactly is wrong here; empty: `reason` says it.
            fix: how to repair it, a sentence; leaving such rows out is always told too.

        Raises: DataError unless bad rows are left out.
        """
        if not self.skip:
            repair = f"{fix.rstrip('.')}, or leave" if fix else "Repair it, or leave"
            raise DataError(
                f"{self.file}, {self.unit} {line}: {detail or reason}. {repair} bad rows out with data.on_bad_row=skip."
            )
        self.counts[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((line, reason))


class Reader(Protocol):
    """Reads one file. `bad` is complete when the blocks are."""

    bad: BadRows
    bytes_read: int  # of the file, so far; for the bar of progress

    def blocks(self) -> Iterator[RowBlock]:
        """The good rows.

        Raises: DataError for a bad row that is not left out, for a file that is no table of its kind, for missing columns;
            ConfigError for a file that cannot be opened.
        """
        ...


# Values: what a row's image path, caption and label may be, where a format holds more than text.

_WHAT = {"image_key": "image path", "caption_key": "caption", "label_key": "label"}


class BadValue(Exception):
    """A value that makes its row a bad one: the kind of fault, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def text_of(setting: str, name: str, value: object) -> str:
    """The text of a value, verbatim.

    Nothing is made text that is not: a number as a caption is a wrong column more often than a caption. Only labels may be
    whole numbers; no label (null) is the empty one, which means no class.

    Args:
        setting: `image_key`, `caption_key` or `label_key`.
        name: of its column, for messages.

    Raises: BadValue.
    """
    if setting == "label_key" and (value is None or type(value) is int):
        return "" if value is None else str(value)
    what = _WHAT[setting]
    if value is None:
        raise BadValue(*absent(setting, name))
    if not isinstance(value, str):
        kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
        shown = f"{kinds.get(type(value), type(value).__name__)}: {_shortened(str(value))}"
        raise BadValue(f"the {what} is no text", f"the {what} {name!r} is no text but {shown}")
    if not value and setting == "image_key":
        raise BadValue(f"no {what}", f"the {what} {name!r} is empty")
    if "\0" in value:
        raise BadValue("NUL character", f"the {what} {name!r} holds a NUL character")
    if len(value) > MAX_CAPTION:
        raise BadValue(*longer_than(setting, name, f"{len(value):,} characters, more than {MAX_CAPTION:,}"))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadValue("not Unicode", f"the {what} {name!r} holds half a surrogate pair") from error
    return value


def longer_than(setting: str, name: str, measure: str) -> tuple[str, str]:
    """Reason and detail for a text of too many characters or bytes."""
    return f"{_WHAT[setting]} too long", f"the {_WHAT[setting]} {name!r} has {measure}"


def absent(setting: str, name: str) -> tuple[str, str]:
    """Reason and detail for a value that is missing."""
    what = _WHAT[setting]
    return f"no {what}", f"there is no {what} ({name!r} is missing or null; data.{setting})"


def no_column(name: str, setting: str, names: Iterable[str]) -> str:
    """The end of a message that began with the file: which column is missing, and which may be meant."""
    listed = list(names)
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in listed], n=1)
    nearest = next((other for other in listed if close and other.lower() == close[0] and other.isprintable()), None)
    shown = ", ".join(repr(_shortened(other)) for other in listed[:20]) or "none"
    if setting == "filter":
        fix = f" Did you mean {nearest!r}?" if nearest else ""
    else:
        fix = f" Set data.{setting}={nearest or '<one of them>'}."
    return f"has no column {name!r} (data.{setting}). Its columns: {shown}.{fix}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
