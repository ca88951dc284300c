"""Rows of pictures with captions, kept as Arrow arrays that worker processes share. Made by `tables.open`.

Captions stay as they are in the file: `null`, `NA`, `007` and the empty caption are text.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from clip_exp.data.files import ImageLimits, read_file, read_member
from clip_exp.data.tables.columns import int32_numpy, number_by_appearance


@dataclass(frozen=True)
class Part:
    """One file of a table: its rows are `start` and the `rows - 1` after it."""

    file: Path
    root: Path  # where its relative image paths start from
    start: int
    rows: int
    bad: dict[str, int] = field(default_factory=dict)  # bad rows that were left out, by reason
    bad_examples: tuple[tuple[int, str], ...] = ()  # the first of them: line and reason
    unit: str = "line"  # what numbers the rows: line, row, sample


@dataclass(frozen=True)
class PairTable:
    """Rows of pictures with captions, labels or both.

    Attributes:
        paths, captions, labels: Arrow strings, a value per row; captions and labels only where they were asked for.
        lines: int64 [rows]: where each row starts in its file, counted from 1.
        parts: the files, in order.
        members: int64 [rows, 2]: offset and size of each picture in its shard; None where pictures are files.
    """

    paths: pa.LargeStringArray
    captions: pa.LargeStringArray | None
    labels: pa.LargeStringArray | None
    lines: np.ndarray
    parts: tuple[Part, ...]
    members: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def root(self) -> Path:
        """Where the relative image paths of the first file start from."""
        return self.parts[0].root

    @property
    def skipped(self) -> int:
        """Bad rows that were left out."""
        return sum(sum(part.bad.values()) for part in self.parts)

    def part(self, row: int) -> Part:
        """The file that a row comes from."""
        return next(part for part in self.parts if row < part.start + part.rows)

    def path(self, row: int) -> str:
        """The picture's path as it is written in the table."""
        return self.paths[row].as_py()

    def image_path(self, row: int) -> str:
        """The picture's path, below the table's image root where it is relative; in a shard, `<shard>/<member>`."""
        return str((self.part(row).root if self.members is None else self.part(row).file) / self.path(row))

    def read_picture(self, row: int, limits: ImageLimits) -> bytearray:
        """The bytes of the picture's file.

        Raises: BadImage with the reason.
        """
        if self.members is None:
            return read_file(self.image_path(row), limits, self.part(row).root)
        offset, size = self.members[row].tolist()
        return read_member(self.part(row).file, offset, size, limits)

    def caption(self, row: int) -> str:
        """The caption, verbatim."""
        if self.captions is None:
            raise ValueError("this table was read without captions")
        return self.captions[row].as_py()

    def label(self, row: int) -> str:
        """The class name, verbatim."""
        if self.labels is None:
            raise ValueError("this table was read without labels")
        return self.labels[row].as_py()

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        part = self.part(row)
        return f"{part.file}, {part.unit} {self.lines[row]}"

    def image_index(self) -> np.ndarray:
        """int32 [rows]: which picture a row shows, numbered by first appearance. Equal paths are the same picture."""
        paths = int32_numpy(self.paths.dictionary_encode().indices)
        if len({part.root for part in self.parts}) == 1:
            return paths
        roots = list(dict.fromkeys(part.root for part in self.parts))
        root = np.repeat([roots.index(part.root) for part in self.parts], [part.rows for part in self.parts])
        return number_by_appearance(root * len(self) + paths)
