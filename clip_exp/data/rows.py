"""What a row of the training stream is: a picture with one of its captions, or a pair of the table."""

from typing import Protocol

from clip_exp.config.data_schema import Captions
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


class PairRows:
    """Every pair of the table is a row."""

    def __init__(self, table: PairTable) -> None:
        self._table = table
        self.pictures = table.pictures

    def __len__(self) -> int:
        return len(self._table)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        return row


class PictureRows:
    """Every distinct picture is a row; which of its captions it comes with is drawn anew in each epoch."""

    def __init__(self, table: PairTable) -> None:
        self._table = table  # not its arrays: a table in an index is pickled as the folder's name
        self.pictures = table.pictures

    def __len__(self) -> int:
        return self.pictures

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        rows = self._table.rows_of(row)
        return int(rows[hash64(_CAPTION, seed, epoch, row) % len(rows)])


def build_rows(table: PairTable, captions: Captions) -> Rows:
    """The rows of the stream for `data.captions`."""
    return PictureRows(table) if captions is Captions.random else PairRows(table)
