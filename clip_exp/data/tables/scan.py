"""The rows of several files of any format in batches of a constant number of rows, and an account of each file."""

import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.data.tables import filters
from clip_exp.data.tables.columns import bool_array, count_blank, string_buffers, trimmed
from clip_exp.data.tables.delimited import DelimitedReader
from clip_exp.data.tables.filters import UnconvertedValues, joined
from clip_exp.data.tables.jsonl import JsonLinesReader
from clip_exp.data.tables.parquet import ParquetReader
from clip_exp.data.tables.reader import FileSignature, Reader, RowBlock, TableOptions, unreadable
from clip_exp.data.tables.shards import ShardReader
from clip_exp.errors import ConfigError, DataError
from clip_exp.progress import progress

log = logging.getLogger(__name__)

BATCH_ROWS = 1 << 16
_BAR_FROM = 64 << 20  # bytes; smaller tables are read before a bar is seen


@dataclass(frozen=True)
class ScannedFile:
    """What was found in a file."""

    path: Path
    signature: FileSignature
    rows: int
    seen: int  # `rows`, bad ones, and those that the filter left out
    digest: str  # of the rows: equal where paths, captions, labels and places in a shard are
    bad: dict[str, int]  # rows that were left out, by reason
    bad_examples: tuple[tuple[int, str], ...]  # the first of them: line and reason
    unit: str  # what numbers the rows: line, row, sample
    empty_captions: int  # of `rows`, blank ones included
    unconverted: tuple[UnconvertedValues, ...]  # values that the filter could not compare


class Scan:
    """Reads files one after the other, once.

    Args:
        files: existing ones.
        options: what to read; reading stops at `max_rows`, and files that come after are not opened.
        advance: is told the bytes that were read since the last call.

    Attributes:
        read: of the files that are done.
    """

    def __init__(self, files: Sequence[Path], options: TableOptions, advance: Callable[[int], None]) -> None:
        self.files, self.options, self.advance = files, options, advance
        self.read: list[ScannedFile] = []
        self._filter = None if options.filter is None else filters.parse(options.filter)
        self._rows = 0

    def blocks(self) -> Iterator[RowBlock]:
        """All rows, in blocks of `BATCH_ROWS`, but for the last.

        Raises: DataError, ConfigError; see `tables.open`.
        """
        yield from _rebatch(block for file in self.files for block in self._blocks_of(file))
        if not self._rows:
            which = f"{self.files[0]}{' and the others' * (len(self.files) > 1)}"
            unconverted = "; ".join(each.describe(file.unit) for file in self.read[:1] for each in file.unconverted)
            raise DataError(
                f"{which}: no row passes data.filter={self.options.filter}.{f' Values that match nothing: {unconverted}.' * bool(unconverted)}"
                if any(file.seen for file in self.read)
                else f"{which}: there are no rows. It takes a row per image-text pair."
            )

    def _blocks_of(self, file: Path) -> Iterator[RowBlock]:
        if self._rows == self.options.max_rows:
            return
        signature = FileSignature.of_table(file, len(self.files))
        reader, digest = open_reader(file, self.options), _Digest()
        before, found, empty_captions, told = self._rows, 0, 0, 0
        unconverted: list[UnconvertedValues] = []
        for block in reader.blocks():
            self.advance(reader.bytes_read - told)
            told = reader.bytes_read
            found += len(block)
            kept = self._kept(block, unconverted)
            if len(kept):
                digest.update(kept)
                empty_captions += count_blank(kept.columns["caption_key"]) if "caption_key" in kept.columns else 0
                self._rows += len(kept)
                yield kept
            if self._rows == self.options.max_rows:
                break
        else:
            self.advance(signature.bytes - told)
        bad = reader.bad
        if not found and (bad.counts or len(self.files) == 1):
            left_out = f" ({bad.counts.total()} bad ones were left out)" if bad.counts else ""
            raise DataError(f"{file} has no rows{left_out}: it needs a row per image-text pair.")
        if not found:  # Spark and its like write such parts
            log.warning("%s has no rows.", file)
        if FileSignature.of_table(file, len(self.files)) != signature:
            raise DataError(f"{file} has changed while it was read: start again when it is complete.")
        rows, seen = self._rows - before, found + bad.counts.total()
        self.read.append(
            ScannedFile(
                file, signature, rows, seen, digest.hex(), dict(bad.counts), tuple(bad.examples), bad.unit,
                empty_captions, tuple(joined(unconverted)),
            )
        )  # fmt: skip

    def _kept(self, block: RowBlock, unconverted: list[UnconvertedValues]) -> RowBlock:
        if self._filter is not None:
            mask, found = self._filter.select(block.extra or {}, block.lines)
            unconverted += found
            if not mask.all():
                chosen = bool_array(mask)
                columns = {name: array.filter(chosen) for name, array in block.columns.items()}
                members = None if block.members is None else block.members[mask]
                block = RowBlock(columns, block.lines[mask], members)
        if "label_key" in block.columns:
            columns = {**block.columns, "label_key": trimmed(block.columns["label_key"])}
            block = RowBlock(columns, block.lines, block.members)
        room = len(block) if self.options.max_rows is None else self.options.max_rows - self._rows
        return _slice(block, 0, room)


def progress_of(files: Sequence[Path]) -> AbstractContextManager[Callable[[int], None]]:
    """A bar on the terminal for tables that take a while; to be told the bytes that are read."""
    size = sum(file.stat().st_size for file in files)
    if size < _BAR_FROM or not sys.stderr.isatty():
        return nullcontext(lambda done: None)
    return progress(size, f"bytes of {files[0].name}")


class _Digest:
    """Of rows, however they are cut into blocks."""

    def __init__(self) -> None:
        self._hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, block: RowBlock) -> None:
        for name, array in block.columns.items():
            starts, data = string_buffers(array)
            self._hashes[f"{name} lengths"].update(np.diff(starts).data)
            self._hashes[name].update(data[starts[0] : starts[-1]].data)
        if block.members is not None:
            self._hashes["members"].update(np.ascontiguousarray(block.members).data)

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
            whole = _concat(pending)
            full = rows - rows % BATCH_ROWS
            for start in range(0, full, BATCH_ROWS):
                yield _slice(whole, start, BATCH_ROWS)
            pending, rows = [_slice(whole, full, rows)], rows - full
    if rows:
        yield _concat(pending)


def _concat(blocks: Sequence[RowBlock]) -> RowBlock:
    if len(blocks) == 1:
        return blocks[0]
    columns = {name: pa.concat_arrays([block.columns[name] for block in blocks]) for name in blocks[0].columns}
    members = [block.members for block in blocks if block.members is not None]
    lines = np.concatenate([block.lines for block in blocks])
    return RowBlock(columns, lines, np.concatenate(members) if members else None)


def _slice(block: RowBlock, start: int, rows: int) -> RowBlock:
    if start == 0 and rows >= len(block):
        return block
    columns = {name: array.slice(start, rows) for name, array in block.columns.items()}
    members = None if block.members is None else block.members[start : start + rows]
    return RowBlock(columns, block.lines[start : start + rows], members)


# Formats: by the end of a file's name, which its first bytes must not contradict.

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
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
    ".feather": "an Arrow file",
    ".arrow": "an Arrow file",
    ".orc": "an ORC file",
    ".avro": "an Avro file",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
    ".npy": "a NumPy array",
    ".npz": "a NumPy archive",
    ".pkl": "a pickle, which is never opened",
    ".pickle": "a pickle, which is never opened",
    ".pt": "a pickle, which is never opened",
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
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a database",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS (fetch the file itself: git lfs pull)",
}
_NAMED = {"Parquet": PARQUET, "a tar": SHARD}  # formats that are read, by what the first bytes say


def open_reader(file: Path, options: TableOptions) -> Reader:
    """The reader of a file: .jsonl .ndjson .json, .parquet .pq, .tar; anything else is delimited text.

    Raises: ConfigError for a compressed file, for a format that is not read, and for a name that its content contradicts.
    """
    suffix = file.suffix.lower()
    if suffix in _COMPRESSED:
        raise ConfigError(
            f"{file} is compressed, so rows cannot be found in it: decompress it ({_COMPRESSED[suffix]} {file})."
        )
    if suffix in _OTHERS:
        raise ConfigError(f"{file} is {_OTHERS[suffix]}: write it as CSV, JSON Lines or Parquet.")
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise unreadable(file, error) from error
    is_tar = head[257:262] == b"ustar"
    content = "a tar" if is_tar else next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if content is not None and suffix not in _NAMED.get(content, ()):
        kinds = {"JSON Lines": JSON_LINES, "Parquet": PARQUET, "a shard": SHARD}
        named = next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "text")
        fix = "give a CSV, JSON Lines or Parquet file or a shard"
        if content in _NAMED:
            fix = f"rename it to {file.stem}{_NAMED[content][0]}"
        raise ConfigError(f"{file} is named like {named}, but is {content}: {fix}.")
    if suffix in JSON_LINES:
        return JsonLinesReader(file, options)
    if suffix in PARQUET:
        return ParquetReader(file, options)
    if suffix in SHARD:
        return ShardReader(file, options)
    return DelimitedReader(file, options)
