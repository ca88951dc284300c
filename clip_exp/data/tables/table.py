"""Rows of images with captions, kept as Arrow batches that worker processes share. Made by `tables.open`.

Captions stay as they are in the file: `null`, `NA`, `007` and the empty caption are text. Labels lose the blanks around them.
"""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.files import ImageLimits, normal_path, read_from_root, read_member
from clip_exp.data.tables.columns import int32_numpy, string_array
from clip_exp.data.tables.filters import UnconvertedValues, as_json, joined
from clip_exp.data.tables.reader import RowBlock
from clip_exp.data.tables.scan import BATCH_ROWS, ScannedFile


@dataclass(frozen=True)
class Part(ScannedFile):
    """One file of a table, its `path` absolute: its rows are `start` and the `rows - 1` after it."""

    root: Path  # where its relative image paths start from; absolute
    start: int


def bad_rows(parts: Iterable[Part]) -> Counter[str]:
    """Bad rows that were left out, by reason."""
    counts = Counter[str]()
    for part in parts:
        counts.update(part.bad)
    return counts


def unconverted_values(parts: Iterable[Part]) -> list[UnconvertedValues]:
    """Values that the filter could not compare, an account per column."""
    return joined(each for part in parts for each in part.unconverted)


class ImageGroups(NamedTuple):
    """The images of a table, numbered by first appearance, where some have several rows."""

    image_index: np.ndarray  # int32 [rows]: the image of each row
    order: np.ndarray  # int32 [rows]: the rows sorted by image, each image's in the table's order
    offsets: np.ndarray  # int64 [images + 1]: where each image's begin in `order`


class StoredRows(Protocol):
    """Where a table's rows are kept. It pickles as little as it can."""

    # Of `BATCH_ROWS` rows, but for the last, with a column of strings per key of the configuration.
    batches: Sequence[pa.RecordBatch]
    lines: np.ndarray  # int64 [rows]: where each row starts in its file, counted from 1
    members: (
        np.ndarray | None
    )  # int64 [rows, 2]: offset and size of each image in its shard; None where images are files

    @property
    def groups(self) -> ImageGroups | None:
        """Rows by image; None where every row has an image of its own."""
        ...


class PairTable:
    """Rows of images with captions, labels or both.

    Args:
        rows: where they are kept.
        parts: the files, in order.

    Attributes:
        paths, captions, labels: Arrow strings, a value per row; captions and labels only where they were asked for.
        lines: int64 [rows]: where each row starts in its file, counted from 1.
        members: int64 [rows, 2]: offset and size of each image in its shard; None where images are files.
    """

    def __init__(self, rows: StoredRows, parts: tuple[Part, ...]) -> None:
        self._rows, self.parts = rows, parts
        self.lines, self.members = rows.lines, rows.members
        names = rows.batches[0].schema.names
        self._columns = {name: [batch.column(name) for batch in rows.batches] for name in names}
        self.paths: pa.ChunkedArray = pa.chunked_array(self._columns["image_key"])
        self.captions: pa.ChunkedArray | None = self._column("caption_key")
        self.labels: pa.ChunkedArray | None = self._column("label_key")
        self._ends = [part.start + part.rows for part in parts]

    def __reduce__(self) -> tuple[Any, ...]:
        return PairTable, (self._rows, self.parts)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def root(self) -> Path:
        """Where the relative image paths of the first file start from."""
        return self.parts[0].root

    @property
    def folders(self) -> set[Path]:
        """Where relative image paths start from, or where the shards are."""
        return {part.root if self.members is None else part.path.parent for part in self.parts}

    @property
    def skipped(self) -> int:
        """Bad rows that were left out."""
        return bad_rows(self.parts).total()

    @property
    def empty_captions(self) -> int:
        """Captions that are empty or blank."""
        return sum(part.empty_captions for part in self.parts)

    def shortcomings(self) -> dict[str, Any]:
        """For a protocol: rows that were left out, empty captions, values that the filter could not compare; no more than there are."""
        found = {
            "bad_rows": self.skipped,
            "empty_captions": self.empty_captions,
            "filter_values": as_json(unconverted_values(self.parts)),
        }
        return {name: value for name, value in found.items() if value}

    @property
    def images(self) -> int:
        """Distinct images."""
        groups = self._rows.groups
        return len(self) if groups is None else len(groups.offsets) - 1

    def rows_of(self, image: int) -> np.ndarray:
        """int32 [n]: the rows that show an image, which is counted by first appearance."""
        groups = self._rows.groups
        if groups is None:
            return np.array([image], dtype=np.int32)
        return groups.order[groups.offsets[image] : groups.offsets[image + 1]]

    def image(self, row: int) -> int:
        """The number of the image that a row shows, counted by first appearance."""
        groups = self._rows.groups
        return row if groups is None else int(groups.image_index[row])

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Name of each file to its `rows`, `bytes` and `digest`. Equal tables have equal ones wherever their files lie."""
        found: dict[str, dict[str, Any]] = {}
        times = Counter[str]()
        for part in self.parts:
            name = part.path.name
            times[name] += 1
            key = name if times[name] == 1 else f"{name} ({times[name]})"
            found[key] = {"rows": part.rows, "bytes": part.signature.bytes, "digest": part.digest}
        return found

    def part(self, row: int) -> Part:
        """The file that a row comes from."""
        return self.parts[bisect_right(self._ends, row)]

    def path(self, row: int) -> str:
        """The image's path as it is written in the table."""
        return self._value("image_key", row)

    def image_path(self, row: int) -> str:
        """The image's path, below the table's image root where it is relative; in a shard, `<shard>/<member>`."""
        return str((self.part(row).root if self.members is None else self.part(row).path) / self.path(row))

    def read_image(self, row: int, limits: ImageLimits) -> bytearray:
        """The bytes of the image's file.

        Raises: BadImage with the reason.
        """
        if self.members is None:
            return read_from_root(self.part(row).root, self.path(row), limits)
        offset, size = self.members[row].tolist()
        return read_member(self.part(row).path, offset, size, limits)

    def caption(self, row: int) -> str:
        """The caption, verbatim."""
        if self.captions is None:
            raise ValueError("this table was read without captions")
        return self._value("caption_key", row)

    def label(self, row: int) -> str:
        """The class name, without blanks around it; empty for none."""
        if self.labels is None:
            raise ValueError("this table was read without labels")
        return self._value("label_key", row)

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        part = self.part(row)
        return f"{part.path}, {part.unit} {self.lines[row]}"

    def image_index(self) -> np.ndarray:
        """int32 [rows]: which image a row shows, numbered by first appearance. Names of a file are the same image."""
        groups = self._rows.groups
        return np.arange(len(self), dtype=np.int32) if groups is None else groups.image_index

    def _value(self, key: str, row: int) -> str:
        batch, index = divmod(int(row), BATCH_ROWS)
        return self._columns[key][batch][index].as_py()

    def _column(self, key: str) -> pa.ChunkedArray | None:
        return pa.chunked_array(self._columns[key]) if key in self._columns else None


class RowsInMemory:
    """`StoredRows` without files.

    Args:
        blocks: as `tables.scan` gives them, of `BATCH_ROWS` rows.
        rows, roots: of each file, see `group_images`.
    """

    def __init__(self, blocks: Sequence[RowBlock], rows: Sequence[int], roots: Sequence[Path]) -> None:
        self.batches: Sequence[pa.RecordBatch] = [block.batch for block in blocks]
        self.lines = np.concatenate([block.lines for block in blocks])
        members = [block.members for block in blocks if block.members is not None]
        self.members: np.ndarray | None = np.concatenate(members) if members else None
        self._rows, self._roots = rows, roots

    @cached_property
    def groups(self) -> ImageGroups | None:
        if self.members is not None:
            return None
        paths = pa.chunked_array([batch.column("image_key") for batch in self.batches])
        return group_images(paths, self._rows, self._roots)


# Which rows show the same image.


def group_images(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[Path]) -> ImageGroups | None:
    """Group the rows by image; None where every row has an image of its own.

    Args:
        paths: a string per row, as it is written; equal ones of a file, and names of the same file (`normal_path`), are the
            same image.
        rows: of each of the table's files.
        roots: folder that each file's relative paths start from, absolute; there may be more of them than of `rows`.
    """
    # Arrow takes no names of folders that are not UTF-8; paths in tables are.
    folders = [normal_path(str(root)).encode("utf-8", "backslashreplace").decode() for root in roots]
    keys = _normal_paths(paths, rows, folders)
    image_index = np.concatenate([int32_numpy(chunk.indices) for chunk in keys.dictionary_encode().chunks])
    if int(image_index.max()) + 1 == len(image_index):
        return None
    order = np.argsort(image_index, kind="stable").astype(np.int32)
    return ImageGroups(image_index, order, offsets=np.concatenate([[0], np.cumsum(np.bincount(image_index))]))


def _normal_paths(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[str]) -> pa.ChunkedArray:
    """A string per row that is equal for names of the same file: `normal_path`, less the folder that all roots share.

    The usual path, which is relative to the only root and has no `.` or `..`, is that already and is not copied.
    """
    shared = os.path.join(os.path.commonpath(roots), "")
    chunks: list[pa.Array] = []
    start = 0
    for count, root in zip(rows, roots, strict=False):
        below = os.path.join(root, "").removeprefix(shared)
        chunks += [_normal_chunk(chunk, shared, below) for chunk in paths.slice(start, count).chunks]
        start += count
    return pa.chunked_array(chunks, pa.large_string())


def _normal_chunk(paths: pa.LargeStringArray, shared: str, below: str) -> pa.Array:
    """Args:
    shared: folder that results are relative to where they are below it; it ends with a slash.
    below: what of a root comes after that, with a slash at its end, or nothing.
    """
    absolute = pc.starts_with(paths, "/")
    keys = pc.binary_join_element_wise(*string_array([below]), paths, *string_array([""])) if below else paths
    if pc.any(absolute).as_py():
        within = pc.utf8_slice_codeunits(paths, len(shared), None)
        keys = pc.if_else(absolute, pc.if_else(pc.starts_with(paths, shared), within, paths), keys)
    unusual = pc.or_(pc.match_substring(paths, "./"), pc.match_substring(paths, "//"))
    if pc.any(unusual).as_py():
        written = paths.filter(unusual).to_pylist()
        root = shared + below
        normal = [normal_path(path if path[0] == "/" else root + path).removeprefix(shared) for path in written]
        keys = pc.replace_with_mask(keys, unusual, string_array(normal))
    return keys
