"""What a row of the training stream is: a picture with one of its captions, or a pair of the table."""

from typing import Protocol

import numpy as np

from clip_exp.config.schema import Captions
from clip_exp.data.randomness import hash64
from clip_exp.data.tables.table import PairTable

_CAPTION = 3


class Rows(Protocol):
    """The rows of the stream, 0 .. len-1."""

    pictures: int  # distinct pictures among them

    def __len__(self) -> int: ...

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        """The table's row that gives picture and caption."""
        ...

    def picture(self, row: int) -> int:
        """The number of the picture, 0 .. pictures-1."""
        ...


class PairRows:
    """Every pair of the table is a row."""

    def __init__(self, table: PairTable) -> None:
        self._image_index = table.image_index()
        self.pictures = int(self._image_index.max()) + 1

    def __len__(self) -> int:
        return len(self._image_index)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        return row

    def picture(self, row: int) -> int:
        return int(self._image_index[row])


class PictureRows:
    """Every distinct picture is a row; which of its captions it comes with is drawn anew in each epoch."""

    def __init__(self, table: PairTable) -> None:
        self.order, self.offsets = group_by_picture(table.image_index())
        self.pictures = len(self.offsets) - 1

    def __len__(self) -> int:
        return self.pictures

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        first, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return int(self.order[first + hash64(_CAPTION, seed, epoch, row) % (end - first)])

    def picture(self, row: int) -> int:
        return row


def build_rows(table: PairTable, captions: Captions) -> Rows:
    """The rows of the stream for `data.captions`."""
    return PictureRows(table) if captions is Captions.random else PairRows(table)


def group_by_picture(image_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Table rows sorted by picture, int32 [rows], and where each picture's begin, int64 [pictures + 1]."""
    order = np.argsort(image_index, kind="stable").astype(np.int32)
    return order, np.concatenate([[0], np.cumsum(np.bincount(image_index))])
