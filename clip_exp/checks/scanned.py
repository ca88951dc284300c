"""A split as it was read: records of its rows and pictures, and its bad pictures written down as they come."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_exp.checks.scan import (
    PICTURE,
    PICTURES_AT_ONCE,
    ROW,
    ROWS_AT_ONCE,
    PictureScan,
    RowScan,
    UnreadableImage,
    joined,
    scan,
)
from clip_exp.checks.splits import VAL, Split
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.files import ImageLimits, kind_of
from clip_exp.data.images import preprocessing_of
from clip_exp.spreadsheets import TextWriter
from clip_exp.text.tokenizer import Tokenizes

UNCUT = 1 << 20  # tokens; more than the longest caption that a table may have
EXAMPLES_OF_KIND = 10


class BadExample(NamedTuple):
    """A bad picture, for people."""

    path: str  # as the table has it
    reason: str
    where: str  # file and line


@dataclass
class BadPictures:
    """Bad pictures of a split, by kind of reason; each is appended to a CSV file."""

    split: Split
    writer: TextWriter
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[BadExample]] = field(default_factory=dict)  # the first of each kind

    def add(self, picture: UnreadableImage) -> None:
        row, kind = int(self.split.first_rows[picture.picture]), kind_of(picture.reason)
        example = BadExample(self.split.path(row), picture.reason, self.split.where(row))
        self.writer.writerow([example.path, example.reason, self.split.name, example.where])
        self.kinds[kind] += 1
        if self.kinds[kind] <= EXAMPLES_OF_KIND:
            self.examples.setdefault(kind, []).append(example)


@contextmanager
def bad_samples_file(path: Path) -> Iterator[TextWriter]:
    """A CSV writer to `path`; its first two columns are those of a training's `bad_samples.csv`."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = TextWriter(file)
        writer.writerow(["path", "reason", "split", "where"])
        yield writer


class Vocabulary(NamedTuple):
    """A tokenizer that does not cut, and what is known of it."""

    uncut: Tokenizes
    context_length: int  # tokens that the model sees
    special: int  # tokens that every caption has

    @classmethod
    def of(cls, tokenizer: Tokenizes) -> "Vocabulary":
        uncut = copy(tokenizer)
        uncut.context_length = UNCUT
        return cls(uncut, tokenizer.context_length, len(uncut.encode("")))


@dataclass(frozen=True)
class Scanned:
    """What was found out about a split.

    Attributes:
        rows: of `scan.ROW`, all of them.
        good: of `scan.PICTURE`, those that can be used among the checked ones.
        checked: pictures that were looked at.
    """

    split: Split
    rows: np.ndarray
    good: np.ndarray
    bad: BadPictures
    checked: int

    @property
    def pictures(self) -> int:
        """Distinct ones of the split."""
        return len(self.split.first_rows)


def scan_split(
    split: Split, config: CheckDataConfig, vocabulary: Vocabulary, workers: int, bad_samples: TextWriter
) -> Scanned:
    """Read all captions of a split and all its pictures, or a sample of them."""
    row_scan = RowScan(split, *vocabulary)
    rows = list(scan(row_scan, workers, f"{split.name}: captions", len(split), ROWS_AT_ONCE))
    chosen = choose(len(split.first_rows), config.max_pictures)
    picture_scan = PictureScan(
        split,
        chosen,
        ImageLimits.of(config.data),
        config.decode,
        config.model.image.image_size,
        config.data.augmentation,
        preprocessing_of(config.model.image).resize_mode if split.name == VAL else None,
    )
    good, bad = [], BadPictures(split, bad_samples)
    for records in scan(picture_scan, workers, f"{split.name}: pictures", len(chosen), PICTURES_AT_ONCE):
        good.append(records.good)
        for picture in records.bad:
            bad.add(picture)
    return Scanned(split, joined(rows, ROW), joined(good, PICTURE), bad, len(chosen))


def choose(pictures: int, most: int | None) -> np.ndarray:
    """int64: all numbers of pictures, or a random sample of `most` of them in order, the same each time."""
    if most is None or pictures <= most:
        return np.arange(pictures)
    return np.sort(np.random.default_rng(0).choice(pictures, most, replace=False))
