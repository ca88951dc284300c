"""Sequential scan of a table's files: batches with a constant number of rows, and statistics of each file."""

import hashlib
import logging
import posixpath
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.config.data import Format
from clip_exp.data.tables import filters
from clip_exp.data.tables.captions import count_lines, count_lists, expand_captions
from clip_exp.data.tables.chinese_clip import ChineseClipReader
from clip_exp.data.tables.columnar import ArrowReader, ParquetReader
from clip_exp.data.tables.columns import count_blank, string_buffers, trimmed
from clip_exp.data.tables.delimited import DelimitedReader
from clip_exp.data.tables.documents import DocumentReader, is_document
from clip_exp.data.tables.features import Shape, describe, shape_of
from clip_exp.data.tables.folders import FolderReader
from clip_exp.data.tables.jsonl import JsonLinesReader
from clip_exp.data.tables.reader import (
    CAPTION,
    COLUMNS,
    BadRows,
    FileSignature,
    Reader,
    RowBlock,
    TableOptions,
    concat,
    is_column,
    unreadable,
    what_of,
)
from clip_exp.data.tables.shards import ShardReader
from clip_exp.data.tables.unconverted import UnconvertedValues, merge_unconverted
from clip_exp.errors import ConfigError, DataError
from clip_exp.progress import progress

log = logging.getLogger(__name__)

BATCH_ROWS = 1 << 16
_PROGRESS_BAR_BYTES = 64 << 20  # bytes; smaller tables are read so fast that they need no progress bar


@dataclass(frozen=True)
class ScannedFile:
    """Statistics of a file."""

    path: Path
    signature: FileSignature
    rows: int
    seen: int  # number of rows, including bad ones and those that do not match the filter
    digest: str  # hash of the paths, captions, labels, further columns and positions in a shard of all rows
    bad: dict[str, int]  # number of bad rows by reason
    bad_examples: tuple[tuple[int, str], ...]  # the first bad rows: number and reason
    unit: str  # unit of the row numbers: line, row or sample
    empty_captions: int  # number of empty or blank captions among `rows`
    unconverted: tuple[UnconvertedValues, ...]  # values that the filter could not compare
    list_captions: int  # number of captions among `rows` that look like a list of captions
    captions_with_lines: int  # number of captions among `rows` that have several lines


class Scan:
    """Single pass over the files of a table.

    Args:
        files: existing files.
        options: columns and rows to read. After `max_rows` rows, the remaining files are not opened.
        advance: callback with the number of bytes read since the last call.
        store: function that stores images whose content is in a table, and returns their offsets and sizes, int64 [rows, 2].

    Attributes:
        read: statistics of the files that are complete.
    """

    def __init__(
        self,
        files: Sequence[Path],
        options: TableOptions,
        advance: Callable[[int], None],
        store: Callable[[pa.Array], np.ndarray],
    ) -> None:
        self.files, self.options, self.advance, self.store = files, options, advance, store
        self.read: list[ScannedFile] = []
        self._filter = None if options.filter is None else filters.parse(options.filter)
        self._rows = 0
        self._shapes: dict[str, Shape] = {}  # of the further columns, by setting, from the first row

    def blocks(self) -> Iterator[RowBlock]:
        """Yield all rows in blocks of `BATCH_ROWS`; the last block may be smaller.

        Raises: DataError, ConfigError; see `tables.open`.
        """
        yield from _rebatch(block for file in self.files for block in self._blocks_of(file))
        if not self._rows:
            which = f"{self.files[0]}{' and the other files' * (len(self.files) > 1)}"
            unconverted = "; ".join(each.describe(file.unit) for file in self.read[:1] for each in file.unconverted)
            if self.options.val_fraction is not None and any(file.seen for file in self.read) and self._filter is None:
                raise DataError(
                    f"{which}: {'no' if self.options.held_out else 'every'} image is held out with data.val_fraction="
                    f"{self.options.val_fraction:g}: {'increase' if self.options.held_out else 'decrease'} it, or set data.val."
                )
            raise DataError(
                f"{which}: no row matches data.filter={self.options.filter}.{f' Values that cannot be compared: {unconverted}.' * bool(unconverted)}"
                if any(file.seen for file in self.read)
                else f"{which}: there are no rows. A table must have one row per image-text pair."
            )

    def _blocks_of(self, file: Path) -> Iterator[RowBlock]:
        if self._rows == self.options.max_rows:
            return
        signature = FileSignature.of_table(file, len(self.files))
        reader, digest = open_reader(file, self.options), _Digest()
        before, found, reported = self._rows, 0, 0
        empty_captions = list_captions = captions_with_lines = 0
        unconverted: list[UnconvertedValues] = []
        for block in reader.blocks():
            self.advance(reader.bytes_read - reported)
            reported = reader.bytes_read
            bad_before = reader.bad.counts.total()
            selected = self._select(block, reader.bad, unconverted)
            found += len(block) - (reader.bad.counts.total() - bad_before)
            if len(selected):
                digest.update(selected)
                if (captions := selected.columns.get(CAPTION)) is not None:
                    empty_captions += count_blank(captions)
                    list_captions += count_lists(captions)
                    captions_with_lines += count_lines(captions)
                self._rows += len(selected)
                yield selected
            if self._rows == self.options.max_rows:
                break
        else:
            self.advance(signature.bytes - reported)
        bad = reader.bad
        if not found and (bad.counts or len(self.files) == 1):
            skipped = f" ({bad.counts.total()} bad rows were skipped)" if bad.counts else ""
            raise DataError(f"{file} has no rows{skipped}: it must have one row per image-text pair.")
        if not found:  # Spark and similar programs write empty parts
            log.warning("%s has no rows.", file)
        if FileSignature.of_table(file, len(self.files)) != signature:
            raise DataError(f"{file} changed while it was being read: start again when it is complete.")
        rows, seen = self._rows - before, found + bad.counts.total()
        self.read.append(
            ScannedFile(
                file, signature, rows, seen, digest.hex(), dict(bad.counts), tuple(bad.examples), bad.unit,
                empty_captions, tuple(merge_unconverted(unconverted)), list_captions, captions_with_lines,
            )
        )  # fmt: skip

    def _select(self, block: RowBlock, bad: BadRows, unconverted: list[UnconvertedValues]) -> RowBlock:
        if self._filter is not None:
            mask, found = self._filter.select(block.extra or {}, block.lines)
            unconverted += found
            block = block.keep(mask)
        if self.options.val_fraction is not None:
            block = block.keep(self._on_this_side(block))
        block = block.keep(self._have_first_shape(block, bad))
        if block.images is not None and len(block):
            block = replace(block, numbers={**block.numbers, "members": self.store(block.images)}, images=None)
        block = expand_captions(block, self.options, bad)
        columns, numbers = block.columns, block.numbers
        if "label_key" in columns:
            columns = {**columns, "label_key": trimmed(columns["label_key"])}
        room = len(block) if self.options.max_rows is None else self.options.max_rows - self._rows
        return RowBlock(columns, numbers).slice(0, room)

    def _on_this_side(self, block: RowBlock) -> np.ndarray:
        """Return bool [rows], True for the rows whose image is held out, or for those of all other images."""
        assert self.options.val_fraction is not None
        limit, seed = int(self.options.val_fraction * 2**64), b"%d/" % self.options.val_seed
        paths = block.columns["image_key"].to_pylist()
        held_out = (int.from_bytes(blake2b(seed + _image_name(path), digest_size=8).digest()) < limit for path in paths)
        return np.fromiter(held_out, dtype=bool, count=len(block)) == self.options.held_out

    def _have_first_shape(self, block: RowBlock, bad: BadRows) -> np.ndarray:
        """Return bool [rows], False for a row whose numbers have another shape than those of the table's first row."""
        good = np.ones(len(block), dtype=bool)
        for setting in filter(is_column, block.columns if len(block) else ()):
            values, name = block.columns[setting], setting.removeprefix(COLUMNS)
            first = self._shapes.setdefault(setting, shape_of(values[0].as_py()))
            for row in np.flatnonzero(good).tolist() if first is not None else ():
                if (shape := shape_of(values[row].as_py())) != first:
                    good[row] = False
                    detail = f"{name!r} has {describe(shape)}, but {describe(first)} in the first row (data.columns)"
                    bad.add(int(block.lines[row]), f"{what_of(setting)} unlike the first row's", detail)
        return good


def _image_name(path: str) -> bytes:
    """Return the name by which an image is held out: equal for usual spellings of a path."""
    return posixpath.normpath(path).encode() if "./" in path or "//" in path else path.encode()


def progress_of(files: Sequence[Path]) -> AbstractContextManager[Callable[[int], None]]:
    """Return a context with a callback for the number of bytes read.

    It shows a progress bar on a terminal for large tables.
    """
    size = sum(file.stat().st_size for file in files)
    if size < _PROGRESS_BAR_BYTES or not sys.stderr.isatty():
        return nullcontext(lambda done: None)
    return progress(size, f"bytes of {files[0].name}")


class _Digest:
    """Digest of rows that does not depend on how they are divided into blocks."""

    def __init__(self) -> None:
        self._hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, block: RowBlock) -> None:
        for name, array in block.columns.items():
            starts, data = string_buffers(array)
            self._hashes[f"{name} lengths"].update(np.diff(starts).data)
            self._hashes[name].update(data[starts[0] : starts[-1]].data)
        for name in block.numbers.keys() - {"lines"}:
            self._hashes[name].update(np.ascontiguousarray(block.numbers[name]).data)

    def hex(self) -> str:
        parts = [f"{name} {self._hashes[name].hexdigest()}\n" for name in sorted(self._hashes)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _rebatch(blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
    pending: list[RowBlock] = []
    rows = 0
    for block in blocks:
        pending.append(block)
        rows += len(block)
        if rows >= BATCH_ROWS:
            whole = concat(pending)
            full = rows - rows % BATCH_ROWS
            for start in range(0, full, BATCH_ROWS):
                yield whole.slice(start, BATCH_ROWS)
            pending, rows = [whole.slice(full, rows)], rows - full
    if rows:
        yield concat(pending)


# Formats, chosen by the file extension, which the first bytes must not contradict.

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow",)
SHARD = (".tar",)
_HEAD = 512  # bytes
_COMPRESSED = {
    ".gz": "gunzip",
    ".tgz": "gunzip",
    ".zst": "unzstd",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zip": "unzip",
    ".lz4": "unlz4",
}
_OTHERS = {
    ".xlsx": "an Excel workbook",
    ".xls": "an Excel workbook",
    ".ods": "a spreadsheet",
    ".feather": "a Feather file",
    ".orc": "an ORC file",
    ".avro": "an Avro file",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
    ".npy": "a NumPy array",
    ".npz": "a NumPy archive",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".pt": "a pickle",
    ".tfrecord": "a TensorFlow record",
    ".sqlite": "a database",
    ".db": "a database",
}
_MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "compressed by gzip (decompress it: gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (decompress it: unzstd)",
    b"BZh": "compressed by bzip2 (decompress it: bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz (decompress it: unxz)",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"ARROW1": "Arrow",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a database",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a Git LFS pointer (download the file itself: git lfs pull)",
}
_NAMED = {"Parquet": PARQUET, "Arrow": ARROW, "a tar": SHARD}  # supported formats, recognized by the first bytes


_READERS: dict[Format, Callable[[Path, TableOptions], Reader]] = {
    Format.text: DelimitedReader,
    Format.jsonl: JsonLinesReader,
    Format.json: DocumentReader,
    Format.coco: DocumentReader,
    Format.karpathy: DocumentReader,
    Format.parquet: ParquetReader,
    Format.arrow: ArrowReader,
    Format.webdataset: ShardReader,
    Format.folder: FolderReader,
    Format.class_folders: FolderReader,
    Format.chinese_clip: ChineseClipReader,
}


def open_reader(file: Path, options: TableOptions) -> Reader:
    """Return the reader for a file or folder, by `data.format`, else by extension; text without a known one is delimited text.

    Raises: ConfigError for a compressed file, for an unsupported format, and for an extension that contradicts the
        content.
    """
    return _READERS[_format_of(file) if options.format is Format.auto else options.format](file, options)


def _format_of(file: Path) -> Format:
    if file.is_dir():
        return Format.folder
    suffix = file.suffix.lower()
    if suffix in _COMPRESSED:
        raise ConfigError(
            f"{file} is compressed, which is not supported: decompress it ({_COMPRESSED[suffix]} {file})."
        )
    if suffix in _OTHERS:
        raise ConfigError(
            f"{file} is {_OTHERS[suffix]}, which is not supported: convert it to CSV, JSON Lines or Parquet."
        )
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise unreadable(file, error) from error
    is_tar = head[257:262] == b"ustar"
    content = "a tar" if is_tar else next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if content is not None and suffix not in _NAMED.get(content, ()):
        kinds = {"JSON": JSON_LINES, "Parquet": PARQUET, "Arrow": ARROW, "a shard": SHARD}
        named = next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "text")
        fix = "use a CSV, JSON Lines or Parquet file or a shard"
        if content in _NAMED:
            fix = f"rename it to {file.stem}{_NAMED[content][0]}"
        raise ConfigError(f"{file} has the extension of {named}, but its content is {content}: {fix}.")
    if suffix in JSON_LINES:
        return Format.json if is_document(file, head) else Format.jsonl
    by_suffix = {PARQUET: Format.parquet, ARROW: Format.arrow, SHARD: Format.webdataset}
    return next((kind for suffixes, kind in by_suffix.items() if suffix in suffixes), Format.text)
