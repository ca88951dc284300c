"""Table of images with captions and labels in Arrow batches that worker processes share.

Created by `tables.open`.

Captions are text, verbatim: `null`, `NA`, `007` and the empty caption are not converted. Blanks around labels are
removed.
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

from clip_exp.data.files import (
    NO_DECODER,
    NO_SUCH_FILE,
    NOT_ALLOWED,
    OUTSIDE_ROOT,
    TOO_MANY_BYTES,
    ImageLimits,
    kind_of,
    local_path,
    normal_path,
    read_from_root,
    read_member,
)
from clip_exp.data.tables.captions import COLUMN
from clip_exp.data.tables.columns import int32_numpy, string_array
from clip_exp.data.tables.features import Shape, parse_numbers, shape_of
from clip_exp.data.tables.reader import COLUMNS, RowBlock, is_column
from clip_exp.data.tables.scan import BATCH_ROWS, ScannedFile
from clip_exp.data.tables.unconverted import UnconvertedValues, as_json, merge_unconverted

COMPARED_ROWS = 1000  # rows of a table that are looked for in another one


@dataclass(frozen=True)
class Part(ScannedFile):
    """One file of a table, with an absolute `path`. Its rows are `start` to `start + rows - 1`."""

    root: Path  # absolute folder of its relative image paths
    start: int


def bad_rows(parts: Iterable[Part]) -> Counter[str]:
    """Count the bad rows that were skipped, by reason."""
    counts = Counter[str]()
    for part in parts:
        counts.update(part.bad)
    return counts


def unconverted_values(parts: Iterable[Part]) -> list[UnconvertedValues]:
    """Return the values that the filter could not compare, one entry per column and kind."""
    return merge_unconverted(each for part in parts for each in part.unconverted)


class ImageGroups(NamedTuple):
    """Rows grouped by image, for a table in which some images have several rows.

    Images are numbered by first appearance.
    """

    image_index: np.ndarray  # int32 [rows]: image of each row
    order: np.ndarray  # int32 [rows]: rows sorted by image, and in the table's order within an image
    offsets: np.ndarray  # int64 [images + 1]: start of each image in `order`


class StoredRows(Protocol):
    """Storage of a table's rows. Its pickle should be small, because each worker process gets one."""

    # Batches of `BATCH_ROWS` rows (the last may be smaller), with a column of strings per setting.
    batches: Sequence[pa.RecordBatch]
    lines: np.ndarray  # int64 [rows]: line in which each row starts, from 1
    # int64 [rows, 2]: offset and size of each image in `images` or its shard; None if images are files.
    members: np.ndarray | None
    # int8 [rows]: which of several caption columns each caption is from; None if there is one column.
    caption_columns: np.ndarray | None
    # File with all images; None: the files of the table have them.
    images: Path | None

    @property
    def groups(self) -> ImageGroups | None:
        """Rows by image; None if every row has its own image."""
        ...


class PairTable:
    """Table of images with captions, labels or both.

    Args:
        rows: storage of the rows.
        parts: files of the table, in order.

    Attributes:
        paths, captions, labels: Arrow strings, one value per row; captions and labels are None unless requested.
        lines: int64 [rows]: line in which each row starts, from 1.
        members: int64 [rows, 2]: offset and size of each image in a file; None if images are files.
        caption_columns: int8 [rows]: which of several caption columns each caption is from; None if there is one column.
        shapes: further columns by name: shape of the numbers in each row, or None for texts.
    """

    verified = True  # the content is part of the fingerprint

    def __init__(self, rows: StoredRows, parts: tuple[Part, ...]) -> None:
        self._rows, self.parts = rows, parts
        self.lines, self.members, self.caption_columns = rows.lines, rows.members, rows.caption_columns
        names = rows.batches[0].schema.names
        self._columns = {name: [batch.column(name) for batch in rows.batches] for name in names}
        self.paths: pa.ChunkedArray = pa.chunked_array(self._columns["image_key"])
        self.captions: pa.ChunkedArray | None = self._column("caption_key")
        self.labels: pa.ChunkedArray | None = self._column("label_key")
        # The first row decides. All others were compared with it by `tables.scan`.
        self.shapes: dict[str, Shape] = {
            setting.removeprefix(COLUMNS): shape_of(self._value(setting, 0)) for setting in filter(is_column, names)
        }
        self._ends = [part.start + part.rows for part in parts]

    @property
    def name(self) -> str:
        """Path of the first file, for messages."""
        return str(self.parts[0].path)

    @property
    def source(self) -> str:
        """Phrase that names the table and its root, to check if images cannot be read."""
        return f"the table {self.name} and data.image_root, now {self.root}"

    def __reduce__(self) -> tuple[Any, ...]:
        return PairTable, (self._rows, self.parts)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def root(self) -> Path:
        """Folder of the relative image paths of the first file."""
        return self.parts[0].root

    @property
    def folders(self) -> set[Path]:
        """Folders of the relative image paths, or of the shards."""
        return {part.root if self.members is None else part.path.parent for part in self.parts}

    @property
    def skipped(self) -> int:
        """Number of bad rows that were skipped."""
        return bad_rows(self.parts).total()

    @property
    def empty_captions(self) -> int:
        """Number of empty or blank captions."""
        return sum(part.empty_captions for part in self.parts)

    def shortcomings(self) -> dict[str, Any]:
        """Return the nonzero ones of: skipped rows, empty captions, values that the filter could not compare."""
        found = {
            "bad_rows": self.skipped,
            "empty_captions": self.empty_captions,
            "filter_values": as_json(unconverted_values(self.parts)),
        }
        return {name: value for name, value in found.items() if value}

    @property
    def images(self) -> int:
        """Number of distinct images."""
        groups = self._rows.groups
        return len(self) if groups is None else len(groups.offsets) - 1

    def rows_of(self, image: int) -> np.ndarray:
        """Return the rows of an image, int32 [n]. Images are numbered by first appearance."""
        groups = self._rows.groups
        if groups is None:
            return np.array([image], dtype=np.int32)
        return groups.order[groups.offsets[image] : groups.offsets[image + 1]]

    def image(self, row: int) -> int:
        """Return the image of a row. Images are numbered by first appearance."""
        groups = self._rows.groups
        return row if groups is None else int(groups.image_index[row])

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return `rows`, `bytes` and `digest` of each file by name.

        Equal tables in different folders have equal fingerprints.
        """
        found: dict[str, dict[str, Any]] = {}
        times = Counter[str]()
        for part in self.parts:
            name = part.path.name
            times[name] += 1
            key = name if times[name] == 1 else f"{name} ({times[name]})"
            found[key] = {"rows": part.rows, "bytes": part.signature.bytes, "digest": part.digest}
        return found

    def fraction_in(self, other: object) -> float:
        """Return the fraction of the rows that are also rows of another table; see `pairs.Origin`."""
        if not isinstance(other, PairTable):
            return 0.0
        rows = np.unique(np.linspace(0, len(self) - 1, COMPARED_ROWS).astype(int))
        # With another root, equal paths are other images.
        contents = {(part.digest, part.root) for part in other.parts}
        lines_of = {
            os.path.realpath(part.path): other.lines[part.start : part.start + part.rows] for part in other.parts
        }
        found = 0
        for part in self.parts:
            of_part = rows[(rows >= part.start) & (rows < part.start + part.rows)]
            if (part.digest, part.root) in contents:
                found += len(of_part)
            elif len(theirs := lines_of.get(os.path.realpath(part.path), ())):
                lines = self.lines[of_part]
                # Rows of a file are in the order of its lines.
                at = np.minimum(np.searchsorted(theirs, lines), len(theirs) - 1)
                found += int((theirs[at] == lines).sum())
        return found / len(rows)

    def part(self, row: int) -> Part:
        """Return the file of a row."""
        return self.parts[bisect_right(self._ends, row)]

    def path(self, row: int) -> str:
        """Return the image path as written in the table."""
        return self._value("image_key", row)

    def image_path(self, row: int) -> str:
        """Return the image path on disk, relative to the image root if necessary; in a shard, `<shard>/<member>`."""
        part, path = self.part(row), self.path(row)
        return str(part.root / local_path(part.root, path) if self.members is None else part.path / path)

    def read_image(self, row: int, limits: ImageLimits) -> bytearray:
        """Read the bytes of an image.

        Raises: BadImage with the reason.
        """
        if self.members is None:
            return read_from_root(self.part(row).root, self.path(row), limits)
        offset, size = self.members[row].tolist()
        return read_member(self.container(row), offset, size, limits)

    def container(self, row: int) -> Path:
        """Return the file that has the content of an image at the offset in `members`."""
        return self._rows.images or self.part(row).path

    def caption(self, row: int) -> str:
        """Return the caption, verbatim."""
        if self.captions is None:
            raise ValueError("this table was read without captions")
        return self._value("caption_key", row)

    def label(self, row: int) -> str:
        """Return the class name without surrounding blanks; empty for no class."""
        if self.labels is None:
            raise ValueError("this table was read without labels")
        return self._value("label_key", row)

    def column(self, name: str, row: int) -> str | np.ndarray:
        """Return the value of a further column: a text, verbatim, or float32 numbers of the column's shape."""
        text = self._value(COLUMNS + name, row)
        if self.shapes[name] is None:
            return text
        numbers = parse_numbers(text)
        assert numbers is not None  # see `shapes`
        return numbers

    def json_column(self, name: str, row: int) -> Any:
        """Return the value of a further column as a JSON value."""
        value = self.column(name, row)
        return value if isinstance(value, str) else value.tolist()

    def where(self, row: int) -> str:
        """Return the file and line of a row, for messages."""
        part = self.part(row)
        return f"{part.path}, {part.unit} {self.lines[row]}"

    def location(self, row: int) -> str:
        """Return the path of an image on disk, and the file and line of its row, for messages."""
        return f"{self.image_path(row)} ({self.where(row)})"

    def remedy(self, row: int, reason: str) -> str:
        """Return what to do if an image, and all others that were tried, cannot be read."""
        kind, path = kind_of(reason), self.path(row)
        if kind == OUTSIDE_ROOT:
            return f"The root is now {self.root}."
        if kind == NO_SUCH_FILE and "://" in path:
            return (
                "Images are read from files, not from URLs: download them first (img2dataset writes shards from such "
                "a table)."
            )
        if kind == NO_SUCH_FILE and self.members is None:
            return f"Relative paths start from {self.root}: set data.image_root."
        if kind == TOO_MANY_BYTES:
            return "Increase data.max_image_bytes, or use smaller images."
        if kind == NO_DECODER:
            return ""  # the reason says what to install
        if kind == NOT_ALLOWED:
            return "Add their format to data.image_formats, or convert the images."
        return "Recreate the shards." if self.members is not None else "Repair the images."

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        """Return the error message for an image that cannot be used.

        Args:
            setting: override with which the command continues without such images.
        """
        return (
            f"The image {self.path(row)!r} ({self.where(row)}) cannot be read: {reason}. Relative paths start from "
            f"{self.part(row).root} (data.image_root). Repair it, or continue without such images: {setting}."
        )

    def image_index(self) -> np.ndarray:
        """Return the image of each row, int32 [rows], numbered by first appearance.

        Different names of one file are the same image.
        """
        groups = self._rows.groups
        return np.arange(len(self), dtype=np.int32) if groups is None else groups.image_index

    def _value(self, key: str, row: int) -> str:
        batch, index = divmod(int(row), BATCH_ROWS)
        return self._columns[key][batch][index].as_py()

    def _column(self, key: str) -> pa.ChunkedArray | None:
        return pa.chunked_array(self._columns[key]) if key in self._columns else None


class RowsInMemory:
    """`StoredRows` in memory.

    Args:
        blocks: blocks of `BATCH_ROWS` rows from `tables.scan`.
        rows, roots: see `group_images`.
        images: file with all images; None: the files of the table have them.
    """

    def __init__(
        self, blocks: Sequence[RowBlock], rows: Sequence[int], roots: Sequence[Path], images: Path | None
    ) -> None:
        self.batches: Sequence[pa.RecordBatch] = [block.batch for block in blocks]
        numbers = {name: np.concatenate([block.numbers[name] for block in blocks]) for name in blocks[0].numbers}
        self.lines = numbers["lines"]
        self.members: np.ndarray | None = numbers.get("members")
        self.caption_columns: np.ndarray | None = numbers.get(COLUMN)
        self.images = images
        self._rows, self._roots = rows, roots

    @cached_property
    def groups(self) -> ImageGroups | None:
        if self.members is not None:
            return group_members(self.members, self._rows)
        paths = pa.chunked_array([batch.column("image_key") for batch in self.batches])
        return group_images(paths, self._rows, self._roots)


# Grouping of rows by image.


def group_members(members: np.ndarray, rows: Sequence[int]) -> ImageGroups | None:
    """Group the rows by image; return None if every row has its own image.

    Args:
        members: int64 [rows, 2]: offset and size of each image. Rows of the same image follow each other.
        rows: number of rows of each file of the table.
    """
    starts = np.ones(len(members), dtype=bool)
    starts[1:] = (members[1:] != members[:-1]).any(axis=1)
    starts[np.cumsum(rows)[:-1]] = True
    if starts.all():
        return None
    order = np.arange(len(members), dtype=np.int32)
    image_index = (np.cumsum(starts) - 1).astype(np.int32)
    return ImageGroups(image_index, order, offsets=np.append(np.flatnonzero(starts), len(members)))


def group_images(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[Path]) -> ImageGroups | None:
    """Group the rows by image; return None if every row has its own image.

    Args:
        paths: image path of each row, as written. Paths that name the same file (`normal_path`) are the same image.
        rows: number of rows of each file of the table.
        roots: absolute folder of the relative paths, for each file; may be longer than `rows`.
    """
    # Arrow strings must be UTF-8. Paths in tables are, but names of folders may not be.
    folders = [normal_path(str(root)).encode("utf-8", "backslashreplace").decode() for root in roots]
    keys = _normal_paths(paths, rows, folders)
    image_index = np.concatenate([int32_numpy(chunk.indices) for chunk in keys.dictionary_encode().chunks])
    if int(image_index.max()) + 1 == len(image_index):
        return None
    order = np.argsort(image_index, kind="stable").astype(np.int32)
    return ImageGroups(image_index, order, offsets=np.concatenate([[0], np.cumsum(np.bincount(image_index))]))


def _normal_paths(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[str]) -> pa.ChunkedArray:
    """Return a string per row that is equal for different names of one file.

    It is `normal_path` relative to the common folder of all roots.

    A usual path, which is relative to the only root and has no `.` or `..`, already has this form and is not copied.
    """
    shared = os.path.join(os.path.commonpath(roots), "")
    chunks: list[pa.Array] = []
    start = 0
    for count, root in zip(rows, roots, strict=False):
        prefix = os.path.join(root, "").removeprefix(shared)
        chunks += [_normal_chunk(chunk, shared, prefix) for chunk in paths.slice(start, count).chunks]
        start += count
    return pa.chunked_array(chunks, pa.large_string())


def _normal_chunk(paths: pa.LargeStringArray, shared: str, prefix: str) -> pa.Array:
    """Normalize a chunk of paths.

    Args:
        shared: common folder of all roots, with a trailing slash. Results in it are relative to it.
        prefix: path of the root relative to `shared`, with a trailing slash, or empty.
    """
    absolute = pc.starts_with(paths, "/")
    keys = pc.binary_join_element_wise(*string_array([prefix]), paths, *string_array([""])) if prefix else paths
    if pc.any(absolute).as_py():
        within = pc.utf8_slice_codeunits(paths, len(shared), None)
        keys = pc.if_else(absolute, pc.if_else(pc.starts_with(paths, shared), within, paths), keys)
    unusual = pc.or_(pc.match_substring(paths, "./"), pc.match_substring(paths, "//"))
    if pc.any(unusual).as_py():
        written = paths.filter(unusual).to_pylist()
        root = shared + prefix
        normal = [normal_path(path if path[0] == "/" else root + path).removeprefix(shared) for path in written]
        keys = pc.replace_with_mask(keys, unusual, string_array(normal))
    return keys
