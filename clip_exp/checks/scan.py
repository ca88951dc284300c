"""Scan of a split by worker processes, with a record per row and per image, and a file of bad images.

The records of a million images take 66 MB, those of a million rows 25 MB.
"""

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from clip_exp.checks.splits import VAL, Split
from clip_exp.checks.statistics import script_of
from clip_exp.config.commands import CheckDataConfig
from clip_exp.config.data import AugmentationConfig
from clip_exp.config.model import ResizeMode
from clip_exp.data.files import (
    JPEGS,
    SIDEWAYS,
    BadImage,
    ImageLimits,
    kind_of,
    normal_path,
    open_image_bytes,
    orientation_of,
)
from clip_exp.data.images import check_strip, decode_rgb, preprocessing_of, train_transform
from clip_exp.data.loader import WorkerLoader, caption_id
from clip_exp.data.randomness import Draws
from clip_exp.data.reading import ReadLimit, reading
from clip_exp.data.tables.columns import BLANKS
from clip_exp.progress import progress
from clip_exp.storage import TextWriter
from clip_exp.text.tokenizer import Tokenizes

T = TypeVar("T")

IMAGES_PER_CHUNK, ROWS_PER_CHUNK = 32, 2048
CROPPED = 16  # one in so many images is also cropped, to measure the time

# Record of a good image. `seconds`: time of reading and decoding; `crop_seconds`: NaN if it was not measured.
IMAGE = np.dtype(
    [
        ("image", "i8"),
        ("digest", "u8", (2,)),
        ("bytes", "i8"),
        ("width", "i4"),
        ("height", "i4"),
        ("format", "S10"),
        ("mode", "S6"),
        ("rotated", "?"),
        ("animated", "?"),
        ("seconds", "f4"),
        ("crop_seconds", "f4"),
    ]
)
# Record of a row. `caption` is a hash of the tokens that the model sees; `tokens` does not count the special tokens.
ROW = np.dtype([("caption", "i8"), ("path", "u8"), ("tokens", "u4"), ("characters", "u4"), ("script", "u1")])


class ImageRecords(NamedTuple):
    """Records of a chunk of images."""

    good: np.ndarray  # dtype IMAGE
    bad: list[tuple[int, str]]  # number in the split, and the reason why training could not use it


@dataclass(frozen=True)
class ImageScan(Dataset[ImageRecords]):
    """Data set of the chunks of a split's images, each of which is read once."""

    split: Split
    images: np.ndarray  # numbers of distinct images (`Split.image_of_row`)
    limits: ImageLimits
    decode: bool  # decode the pixels, or only read the headers
    image_size: int  # side of the measured crop, pixels
    augmentation: AugmentationConfig
    # Resize mode of validation, which refuses images that it cannot resize; None for training images.
    validated: ResizeMode | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // IMAGES_PER_CHUNK)

    def __getitem__(self, chunk: int) -> ImageRecords:
        good, bad = [], []
        for image in self.images[chunk * IMAGES_PER_CHUNK : (chunk + 1) * IMAGES_PER_CHUNK].tolist():
            reading(self.split.image_path(int(self.split.first_rows[image])))
            try:
                good.append(self._inspect(image))
            except BadImage as error:
                bad.append((image, str(error)))
        return ImageRecords(np.array(good, dtype=IMAGE), bad)

    def _inspect(self, image: int) -> tuple[Any, ...]:
        started_s = time.perf_counter()
        data = self.split.read_image(int(self.split.first_rows[image]), self.limits)
        pixels = decode_rgb(data, self.limits) if self.decode else None
        seconds, crop_seconds = time.perf_counter() - started_s, np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = open_image_bytes(data, self.limits)
            orientation = orientation_of(header)
            try:
                animated = header.format not in JPEGS and bool(getattr(header, "is_animated", False))
            except Exception:  # training uses only the first frame of a damaged animation
                animated = False
        turned = orientation in SIDEWAYS and header.format != "TIFF"  # whose size is already that of the upright image
        width, height = header.size[::-1] if turned else header.size
        if self.validated is not None:
            check_strip(width, height, self.validated)
        if pixels is not None and image % CROPPED == 0:
            started_s = time.perf_counter()
            train_transform(pixels, self.image_size, Draws(image), self.augmentation)
            crop_seconds = time.perf_counter() - started_s
        digest = np.frombuffer(blake2b(data, digest_size=16).digest(), "u8")
        name, mode, rotated = str(header.format).encode(), header.mode.encode(), orientation in range(2, 9)
        return image, digest, len(data), width, height, name, mode, rotated, animated, seconds, crop_seconds


@dataclass(frozen=True)
class RowScan(Dataset[np.ndarray]):
    """Data set of the chunks of a split's rows, with dtype ROW."""

    split: Split
    tokenizer: Tokenizes  # tokenizer that does not truncate
    context_length: int  # tokens of a caption that the model sees
    special: int  # number of special tokens in each caption

    def __len__(self) -> int:
        return -(-len(self.split) // ROWS_PER_CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray:
        rows = range(chunk * ROWS_PER_CHUNK, min((chunk + 1) * ROWS_PER_CHUNK, len(self.split)))
        captions = [self._caption(row) for row in rows]
        records = [
            (
                caption_id(ids[: self.context_length - 1]),
                _path_key(self.split.image_path(row)),
                len(ids) - self.special,
                len(caption.strip(BLANKS)),
                script_of(caption),
            )
            for row, caption, ids in zip(rows, captions, self.tokenizer.encode_batch(captions), strict=True)
        ]
        return np.array(records, dtype=ROW)

    def _caption(self, row: int) -> str:
        reading(self.split.image_path(row))
        return self.split.caption(row)


def scan(dataset: Dataset[T], workers: int, limit: ReadLimit, what: str, total: int, chunk_size: int) -> Iterator[T]:
    """Yield the chunks of a data set in order, with a progress bar.

    Args:
        workers: maximum number of worker processes; 0: read in this process.
        limit: longest wait for a worker that makes no progress.
        what: label of the progress bar.
        total: number of items in all chunks.
        chunk_size: number of items in each chunk but the last.
    """
    workers = min(workers, -(-total // chunk_size))
    loader: DataLoader[T] = WorkerLoader(
        dataset, limit=limit, batch_size=None, num_workers=workers, collate_fn=_identity
    )
    with progress(total, what) as advance:
        for number, chunk in enumerate(loader):
            yield chunk
            advance(min(chunk_size, total - number * chunk_size))


def _identity(chunk: T) -> T:
    return chunk


def _path_key(path: str) -> int:
    return int.from_bytes(blake2b(normal_path(path).encode(errors="surrogateescape"), digest_size=8).digest(), "little")


UNCUT = 1 << 20  # context length above the longest caption that a table may have
EXAMPLES_OF_KIND = 10


class BadExample(NamedTuple):
    """Readable record of a bad image."""

    path: str  # as written in the table
    reason: str
    where: str  # file and line


@dataclass
class BadImages:
    """Record of the bad images of a split by kind of reason, which also appends each of them to a CSV file."""

    split: Split
    writer: TextWriter
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[BadExample]] = field(default_factory=dict)  # the first of each kind

    def add(self, image: int, reason: str) -> None:
        row, kind = int(self.split.first_rows[image]), kind_of(reason)
        example = BadExample(self.split.path(row), reason, self.split.where(row))
        self.writer.writerow([example.path, example.reason, self.split.name, example.where])
        self.kinds[kind] += 1
        if self.kinds[kind] <= EXAMPLES_OF_KIND:
            self.examples.setdefault(kind, []).append(example)


@contextmanager
def bad_samples_file(path: Path) -> Iterator[TextWriter]:
    """Open a CSV writer to `path`. The first two columns are those of `bad_samples.csv` of a training run."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = TextWriter(file)
        writer.writerow(["path", "reason", "split", "where"])
        yield writer


class Vocabulary(NamedTuple):
    """Tokenizer that does not truncate, with the context length of the model."""

    uncut: Tokenizes
    context_length: int  # tokens that the model sees
    special: int  # number of special tokens in each caption

    @classmethod
    def of(cls, tokenizer: Tokenizes) -> "Vocabulary":
        uncut = copy(tokenizer)
        uncut.context_length = UNCUT
        return cls(uncut, tokenizer.context_length, len(uncut.encode("")))


@dataclass(frozen=True)
class Scanned:
    """Result of the scan of a split."""

    split: Split
    rows: np.ndarray  # dtype ROW, all rows
    good: np.ndarray  # dtype IMAGE, the checked images that can be used
    bad: BadImages
    checked: int  # number of images that were checked

    @property
    def images(self) -> int:
        """Number of distinct images of the split."""
        return len(self.split.first_rows)


def scan_split(
    split: Split, config: CheckDataConfig, vocabulary: Vocabulary, workers: int, bad_samples: TextWriter
) -> Scanned:
    """Read all captions of a split, and all images or a sample of them."""
    row_scan, limit = RowScan(split, *vocabulary), ReadLimit(config.data.timeout_s, "data.timeout_s")
    rows = [np.empty(0, ROW), *scan(row_scan, workers, limit, f"{split.name}: captions", len(split), ROWS_PER_CHUNK)]
    chosen = choose(len(split.first_rows), config.max_images)
    image_scan = ImageScan(
        split,
        chosen,
        ImageLimits.of(config.data),
        config.decode,
        config.model.image.image_size,
        config.data.augmentation,
        preprocessing_of(config.model.image).resize_mode if split.name == VAL else None,
    )
    good, bad = [np.empty(0, IMAGE)], BadImages(split, bad_samples)
    for records in scan(image_scan, workers, limit, f"{split.name}: images", len(chosen), IMAGES_PER_CHUNK):
        good.append(records.good)
        for image, reason in records.bad:
            bad.add(image, reason)
    return Scanned(split, np.concatenate(rows), np.concatenate(good), bad, len(chosen))


def choose(images: int, most: int | None) -> np.ndarray:
    """Return the numbers of all images, int64, or a sorted random sample of `most` of them.

    The sample is deterministic.
    """
    if most is None or images <= most:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).choice(images, most, replace=False))
