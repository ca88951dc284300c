"""Interface between a run and its sources of image-text pairs, and its implementation for tables.

    Rows     training rows: one image with one caption each
    Items    validation images: each with all its captions
    Origin   the table or data set that they come from, as checks and reports see it

`data.custom` implements the interface for a user's Dataset. No other module distinguishes the two. Does not import
torch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from clip_exp.config.data import Captions
from clip_exp.data.files import ImageLimits, normal_path
from clip_exp.data.image_sets import label_of_images
from clip_exp.data.randomness import hash64
from clip_exp.data.tables.features import Shape
from clip_exp.data.tables.table import PairTable, Part

# Content of an image file, an image opened with Pillow, or pixels as uint8 [H, W, 3]
RawImage = bytearray | Image.Image | np.ndarray
# First integer of a random key, so that different uses of one seed are independent.
_CAPTION = 3


class Pair(NamedTuple):
    """Image with one caption, for training."""

    image: RawImage
    caption: str
    image_id: int  # int64, equal for equal images of all sources of the stream
    columns: dict[str, str | np.ndarray]  # further columns by name (`data.columns`): a text, or float32 numbers


class Item(NamedTuple):
    """Image with all its captions, for validation."""

    image: RawImage
    captions: list[str]
    caption_indices: list[int]  # distinct numbers, in the order of the images and captions
    label: int  # position in `Items.class_names`; -1 without a class


class Origin(Protocol):
    """Table or data set. Its rows are numbered from 0."""

    @property
    def name(self) -> str:
        """Name for messages: the path of the first file, or the name of the class."""
        ...

    @property
    def source(self) -> str:
        """Phrase that names the table and its root, or the class, to check if images cannot be read."""
        ...

    # Files of a table, with the number of rows and the skipped ones; none for a data set
    parts: tuple[Part, ...]
    # Whether the content is part of the fingerprint
    verified: bool

    @property
    def skipped(self) -> int:
        """Number of bad rows that were skipped."""
        ...

    @property
    def empty_captions(self) -> int: ...

    def __len__(self) -> int: ...

    def read_image(self, row: int, limits: ImageLimits) -> RawImage:
        """Read an image without decoding it.

        Raises: BadImage with the reason.
        """
        ...

    def location(self, row: int) -> str:
        """Return the name and the location of an image, for messages."""
        ...

    def remedy(self, row: int, reason: str) -> str:
        """Return what to do if an image, and all others that were tried, cannot be read."""
        ...

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        """Return the error message for an image that cannot be used.

        Args:
            setting: override with which the command continues without such images.
        """
        ...

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return `rows` and `digest` of each file or data set by name, and `bytes` of each file."""
        ...

    def fraction_in(self, other: "Origin") -> float:
        """Return the fraction of the rows that are also rows of `other`, estimated from a sample; 0 if that is not known.

        Rows are the same if they are the same line of the same file, or if their files have the same content and image root.
        """
        ...


class Rows(Protocol):
    """Rows of one source of the training stream, as `data.captions` defines them."""

    @property
    def origin(self) -> Origin: ...

    # Number of distinct images
    images: int
    # Whether neighboring rows are read much faster than distant ones
    in_shards: bool
    # Further columns by name: shape of the numbers, or None for texts
    shapes: dict[str, Shape]

    def __len__(self) -> int: ...

    def load(self, row: int, seed: int, epoch: int, limits: ImageLimits) -> Pair:
        """Return the image of a row and its caption in an epoch.

        Raises: BadImage with the reason.
        """
        ...

    def caption(self, row: int, seed: int, epoch: int) -> str | None:
        """Return the caption of a row in an epoch without reading its image; None if that is not possible."""
        ...

    def image_name(self, row: int) -> str:
        """Return the name of an image for the list of bad images."""
        ...

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        """Return the error message for an image that cannot be used; see `Origin.unreadable`."""
        ...


class Items(Protocol):
    """Images of the validation data."""

    @property
    def origins(self) -> Sequence[Origin]:
        """The tables or the data set of the images."""
        ...

    # Names of the classes; empty without labels
    class_names: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int, limits: ImageLimits) -> Item:
        """Return an image with its captions and its label.

        Raises: BadImage with the reason.
        """
        ...

    def image_name(self, index: int) -> str:
        """Return the name of an image for the list of bad images."""
        ...

    def unreadable(self, index: int, reason: str, setting: str) -> str:
        """Return the error message for an image that cannot be used; see `Origin.unreadable`."""
        ...


def int64_hash(*parts: bytes | bytearray | memoryview) -> int:
    """Return a hash that is equal in every process, as a signed 64-bit integer."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


# Tables.


class TableRows:
    """Rows of a table in the training stream.

    With `all`, every image-text pair of the table is a row. With `random`, every distinct image is a row, and one of
    its captions is drawn in each epoch.

    Args:
        folder: common parent folder of all sources, with a trailing slash, if only the full path identifies an image;
            it may differ between nodes. None: the table alone identifies its images.
        weights: probabilities of the caption columns, relative to each other; None: all captions are equally probable.
    """

    def __init__(
        self,
        table: PairTable,
        captions: Captions,
        folder: str | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        # Keep the table, not its arrays: an indexed table is memory-mapped and pickles as its folder, so all workers
        # share one copy.
        self.origin = table
        self._captions, self._folder, self._weights = captions, folder, weights
        self.images = table.images
        self.in_shards = table.members is not None
        self.shapes = table.shapes

    def __len__(self) -> int:
        return self.images if self._captions is Captions.random else len(self.origin)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        """Return the row of the table that holds the image and the caption of `row` in an epoch."""
        if self._captions is not Captions.random:
            return row
        rows = self.origin.rows_of(row)
        if self._weights is None or self.origin.caption_columns is None:
            return int(rows[caption_number(row, seed, epoch, len(rows))])
        return int(rows[weighted_caption(row, seed, epoch, self.origin.caption_columns[rows], self._weights)])

    def load(self, row: int, seed: int, epoch: int, limits: ImageLimits) -> Pair:
        table_row = self.table_row(row, seed, epoch)
        image = self.origin.read_image(table_row, limits)
        columns = {name: self.origin.column(name, table_row) for name in self.shapes}
        return Pair(image, self.origin.caption(table_row), self.image_id(table_row), columns)

    def caption(self, row: int, seed: int, epoch: int) -> str:
        return self.origin.caption(self.table_row(row, seed, epoch))

    def image_id(self, table_row: int) -> int:
        """Return an int64 that is equal for rows with the same image, across all sources of the stream."""
        if self._folder is None:
            return self.origin.image(table_row)
        # Ranks compare these numbers, so they must not depend on the folder in which a node stores the data.
        name = normal_path(self.origin.image_path(table_row)).removeprefix(self._folder)
        return int64_hash(name.encode(errors="surrogateescape"))

    def image_name(self, row: int) -> str:
        first = self._first(row)
        return self.origin.path(first) if self._folder is None else self.origin.image_path(first)

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        return self.origin.unreadable(self._first(row), reason, setting)

    def _first(self, row: int) -> int:
        """Return the first row of the table with the image of a row of the stream."""
        image = row if self._captions is Captions.random else self.origin.image(row)
        return int(self.origin.rows_of(image)[0])


class TableItems:
    """Distinct images of a validation table, with or without labels.

    An image with an empty label has no class.

    Raises: DataError if two rows give an image different labels.
    """

    def __init__(self, table: PairTable) -> None:
        self.origin, self.origins = table, [table]
        labels = [""] * table.images if table.labels is None else label_of_images(table)
        self.class_names: list[str] = sorted(set(labels) - {""})
        position = {"": -1, **{name: index for index, name in enumerate(self.class_names)}}
        self._labels = np.array([position[label] for label in labels], dtype=np.int32)

    def __len__(self) -> int:
        return self.origin.images

    def load(self, index: int, limits: ImageLimits) -> Item:
        table, rows = self.origin, self.origin.rows_of(index).tolist()
        captions = [] if table.captions is None else [table.caption(row) for row in rows]
        image = table.read_image(rows[0], limits)
        return Item(image, captions, rows if captions else [], int(self._labels[index]))

    def image_name(self, index: int) -> str:
        row = int(self.origin.rows_of(index)[0])
        return self.origin.image_path(row) if needs_full_paths(self.origin) else self.origin.path(row)

    def unreadable(self, index: int, reason: str, setting: str) -> str:
        return self.origin.unreadable(int(self.origin.rows_of(index)[0]), reason, setting)


class JoinedItems:
    """Images of several tables, one after the other.

    Args:
        parts: items of each table.
    """

    def __init__(self, parts: Sequence[TableItems]) -> None:
        self.parts = parts
        self.origins = [part.origin for part in parts]
        self.class_names = sorted({name for part in parts for name in part.class_names})
        self._ends = list(accumulate(map(len, parts)))
        self._first_captions = [0, *accumulate(len(part.origin) for part in parts)]
        position = {name: index for index, name in enumerate(self.class_names)}
        self._labels = [[*(position[name] for name in part.class_names), -1] for part in parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, index: int, limits: ImageLimits) -> Item:
        part, index = self._find(index)
        item = self.parts[part].load(index, limits)
        numbers = [self._first_captions[part] + number for number in item.caption_indices]
        return item._replace(caption_indices=numbers, label=self._labels[part][item.label])

    def image_name(self, index: int) -> str:
        part, index = self._find(index)
        return self.origins[part].image_path(int(self.origins[part].rows_of(index)[0]))

    def unreadable(self, index: int, reason: str, setting: str) -> str:
        part, index = self._find(index)
        return self.parts[part].unreadable(index, reason, setting)

    def _find(self, index: int) -> tuple[int, int]:
        """Return the table of an image, and its number in it."""
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def caption_number(row: int, seed: int, epoch: int, captions: int) -> int:
    """Return which of the captions of a row is used in an epoch."""
    return hash64(_CAPTION, seed, epoch, row) % captions


def weighted_caption(row: int, seed: int, epoch: int, columns: np.ndarray, weights: Sequence[float]) -> int:
    """Return which of the captions of a row is used in an epoch.

    The weight of a column is divided equally among its captions. That of a column without a caption goes to the others.

    Args:
        columns: column of each caption, int [captions].
        weights: weight of each column.
    """
    counts = np.bincount(columns, minlength=len(weights))
    ends = np.cumsum((np.asarray(weights) / np.maximum(counts, 1))[columns])
    drawn = hash64(_CAPTION, seed, epoch, row) / 2**64 * ends[-1]
    return min(int(np.searchsorted(ends, drawn, side="right")), len(columns) - 1)


def needs_full_paths(table: PairTable) -> bool:
    """Return True if equal paths in a table may be different images, because it spans several folders or shards."""
    return table.members is not None or len({part.root for part in table.parts}) > 1


def bytes_of(image: RawImage) -> bytes | bytearray:
    """Return bytes that are equal for equal images from one source: those of the file, or the pixels."""
    if isinstance(image, bytearray):
        return image
    return image.tobytes()
