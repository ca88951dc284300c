"""What every format of a table gives: blocks of good rows, and an account of the bad ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from clip_exp.errors import DataError

MAX_CAPTION = 32_768  # characters; longer ones are bad rows: more often a quote that never closes than a caption
MAX_EXAMPLES = 1_000  # bad rows of a file that are remembered one by one


class RowBlock(NamedTuple):
    """Good rows of one file, in order."""

    columns: dict[str, pa.Array]  # by key of the configuration (image_key, …): LargeString, no nulls
    lines: np.ndarray  # int64: where each row starts, counted from 1: a line, a row of Parquet, a sample of a shard
    members: np.ndarray | None = None  # int64 [rows, 2]: offset and size of each picture in its shard, bytes
    extra: dict[str, pa.Array] | None = None  # columns that the filter names, as the file has them

    def __len__(self) -> int:
        return len(self.lines)


@dataclass
class BadRows:
    """Bad rows of one file: raised at the first, or counted by reason.

    Args:
        file: for messages.
        skip: leave bad rows out (`data.on_bad_row=skip`).
    """

    file: Path
    skip: bool
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
