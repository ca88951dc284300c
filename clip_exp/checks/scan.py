"""What worker processes say of pictures and captions: a record each, in arrays: 66 MB for a million pictures, 25 MB for a million rows."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torchvision.io  # noqa: F401 - imported when the first JPEG is decoded, it would count as time of that
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clip_exp.checks.scripts import script_of
from clip_exp.checks.splits import Split
from clip_exp.config.data import AugmentationConfig
from clip_exp.config.model import ResizeMode
from clip_exp.data.files import JPEGS, ON_THEIR_SIDE, BadImage, ImageLimits, normal_path, open_picture, orientation_of
from clip_exp.data.images import check_strip, decode_rgb, train_transform
from clip_exp.data.loader import WorkerLoader, caption_id
from clip_exp.data.randomness import Draws
from clip_exp.data.tables.columns import BLANKS
from clip_exp.progress import progress
from clip_exp.text.tokenizer import Tokenizes

T = TypeVar("T")

PICTURES_AT_ONCE, ROWS_AT_ONCE = 32, 2048
CROPPED = 16  # every so many pictures are cropped too, to measure what that takes

# A good picture. `seconds`: reading and decoding; `crop_seconds`: NaN where it was not measured.
PICTURE = np.dtype(
    [
        ("picture", "i8"),
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
# A row. Equal `caption`s are the same tokens to the model; `tokens`: without those that every caption has.
ROW = np.dtype([("caption", "i8"), ("path", "u8"), ("tokens", "u4"), ("characters", "u4"), ("script", "u1")])


class UnreadableImage(NamedTuple):
    """A picture that training could not use."""

    picture: int  # its number in the split
    reason: str


class PictureRecords(NamedTuple):
    """What is known of some pictures of a split."""

    good: np.ndarray  # of PICTURE
    bad: list[UnreadableImage]


@dataclass(frozen=True)
class PictureScan(Dataset[PictureRecords]):
    """Chunks of a split's pictures, read once each.

    Args:
        pictures: numbers of distinct pictures (`Split.picture_of_row`).
        decode: whether pixels are decoded, or only headers looked at.
        image_size: side of the crop that is measured, pixels.
        validated: how validation resizes the pictures, which refuses what it cannot; None: they are trained on.
    """

    split: Split
    pictures: np.ndarray
    limits: ImageLimits
    decode: bool
    image_size: int
    augmentation: AugmentationConfig
    validated: ResizeMode | None = None

    def __len__(self) -> int:
        return -(-len(self.pictures) // PICTURES_AT_ONCE)

    def __getitem__(self, chunk: int) -> PictureRecords:
        good, bad = [], []
        for picture in self.pictures[chunk * PICTURES_AT_ONCE : (chunk + 1) * PICTURES_AT_ONCE].tolist():
            try:
                good.append(self._look_at(picture))
            except BadImage as error:
                bad.append(UnreadableImage(picture, str(error)))
        return PictureRecords(np.array(good, dtype=PICTURE), bad)

    def _look_at(self, picture: int) -> tuple[Any, ...]:
        started_s = time.perf_counter()
        data = self.split.read_picture(int(self.split.first_rows[picture]), self.limits)
        image = decode_rgb(data, self.limits) if self.decode else None
        seconds, crop_seconds = time.perf_counter() - started_s, np.nan
        header = describe_header(open_picture(data, self.limits))
        if self.validated is not None:
            check_strip(header[0], header[1], self.validated)
        if image is not None and picture % CROPPED == 0:
            started_s = time.perf_counter()
            train_transform(image, self.image_size, Draws(picture), self.augmentation)
            crop_seconds = time.perf_counter() - started_s
        digest = np.frombuffer(blake2b(data, digest_size=16).digest(), "u8")
        return (picture, digest, len(data), *header, seconds, crop_seconds)


def describe_header(picture: Image.Image) -> tuple[int, int, bytes, bytes, bool, bool]:
    """Width and height of the upright picture, format, mode, whether EXIF turns it, whether it is animated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orientation = orientation_of(picture)
        try:
            animated = picture.format not in JPEGS and bool(getattr(picture, "is_animated", False))
        except Exception:  # of a damaged animation the first frame is all that training looks at
            animated = False
    width, height = picture.size
    if orientation in ON_THEIR_SIDE:
        width, height = height, width
    return width, height, str(picture.format).encode(), picture.mode.encode(), orientation in range(2, 9), animated


@dataclass(frozen=True)
class RowScan(Dataset[np.ndarray]):
    """Chunks of a split's rows, of ROW.

    Args:
        tokenizer: one that does not cut.
        context_length: ids of a caption that the model sees.
        special: ids that every caption has.
    """

    split: Split
    tokenizer: Tokenizes
    context_length: int
    special: int

    def __len__(self) -> int:
        return -(-len(self.split) // ROWS_AT_ONCE)

    def __getitem__(self, chunk: int) -> np.ndarray:
        rows = range(chunk * ROWS_AT_ONCE, min((chunk + 1) * ROWS_AT_ONCE, len(self.split)))
        captions = [self.split.caption(row) for row in rows]
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


def scan(dataset: Dataset[T], workers: int, what: str, total: int, at_once: int) -> Iterator[T]:
    """The chunks of a data set in their order, with a progress bar.

    Args:
        workers: processes, no more than there are chunks; 0: this one.
        what: shown before the bar.
        total: things in all the chunks; `at_once` in each but the last.
    """
    workers = min(workers, -(-total // at_once))
    loader: DataLoader[T] = WorkerLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    with progress(total, what) as advance:
        for number, chunk in enumerate(loader):
            yield chunk
            advance(min(at_once, total - number * at_once))


def joined(records: Sequence[np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
    """Arrays one after the other; an empty one of `dtype` for none."""
    return np.concatenate([np.empty(0, dtype), *records])


def _as_it_is(chunk: T) -> T:
    return chunk


def _path_key(path: str) -> int:
    return int.from_bytes(blake2b(normal_path(path).encode(errors="surrogateescape"), digest_size=8).digest(), "little")
