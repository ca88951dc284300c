"""Splits to check: the tables for training and validation, with a single numbering of the rows.

Does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from clip_exp.config.base import Target
from clip_exp.config.data import DataConfig, OnBadRow
from clip_exp.data.files import ImageLimits
from clip_exp.data.generated import resolve_generated
from clip_exp.data.stream import INDEX, open_train_tables, open_val_tables
from clip_exp.data.tables.table import PairTable, Part

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Split:
    """Rows of `data.train` or `data.val`, from one table or from several mixed sources."""

    name: str  # `train` or `val`
    tables: tuple[PairTable, ...]  # their rows are numbered consecutively

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parts(self) -> Iterator[Part]:
        """Files of the tables."""
        return (part for table in self.tables for part in table.parts)

    @cached_property
    def image_of_row(self) -> np.ndarray:
        """Image of each row, int64 [rows], numbered by first appearance.

        Different names of one file are the same image.
        """
        numbers, images = [], 0
        for table in self.tables:
            numbers.append(table.image_index().astype(np.int64) + images)
            images = int(numbers[-1].max()) + 1
        return np.concatenate(numbers)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """First row of each distinct image, int64 [images]."""
        return np.unique(self.image_of_row, return_index=True)[1]

    def path(self, row: int) -> str:
        """Return the image path as written in the table."""
        table, local = self._locate(row)
        return table.path(local)

    def path_of(self, image: int) -> str:
        """Return the path of a distinct image as written in its first row."""
        return self.path(int(self.first_rows[image]))

    def image_path(self, row: int) -> str:
        """Return the image path on disk; in a shard, `<shard>/<member>`."""
        table, local = self._locate(row)
        return table.image_path(local)

    def caption(self, row: int) -> str:
        """Return the caption, verbatim."""
        table, local = self._locate(row)
        return table.caption(local)

    def where(self, row: int) -> str:
        """Return the file and line of a row, for messages."""
        table, local = self._locate(row)
        return table.where(local)

    def read_image(self, row: int, limits: ImageLimits) -> bytearray:
        """Read the bytes of an image.

        Raises: BadImage with the reason.
        """
        table, local = self._locate(row)
        return table.read_image(local, limits)

    def _locate(self, row: int) -> tuple[PairTable, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.tables[number], row - int(self._starts[number])


def open_splits(config: DataConfig, output_dir: Path) -> list[Split]:
    """Open the training tables and, if `data.val` is set, the validation table. Bad rows are skipped and counted.

    Raises:
        ConfigError: a file does not exist.
        DataError: a column is missing, or there are no good rows.
    """
    config = resolve_generated(config, output_dir).model_copy(
        update={"on_bad_row": OnBadRow.skip, "val": config.val or None}
    )
    index_dir = output_dir / INDEX
    splits = [Split(TRAIN, tuple(table for _, table in open_train_tables(config, index_dir)))]
    tables = () if isinstance(config.val, Target) else tuple(open_val_tables(config, index_dir))
    return [*splits, Split(VAL, tables)] if tables else splits
